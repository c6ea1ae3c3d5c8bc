"""GOFT: W turns by n − 1 rotations in planes, arranged as a tree (Ma et al. 2024, arXiv 2404.04316).

    W' = W Rᵀ,   R = P_L … P_2 P_1      one angle for every plane, 0 at the start

    entries of a row  0   1   2   3   4   5   6   7
    stage 1           └─┬─┘   └─┬─┘   └─┬─┘   └─┬─┘
    stage 2             └───┬───┘       └───┬───┘        stage r: planes of the axes 2^r k and 2^r k + 2^(r−1)
    stage 3                 └───────┬───────┘

On activations it is y = (x R) Wᵀ, the last stage first. Of every pair only the first axis goes on to the next stage, so
all stages together cost what two of full width would. An axis without a partner waits, so n need be no power of two.

What the n − 1 angles can do: turn any one given vector into any other of its length. That is what the paper proves
where it says "any rotation"; all rotations together have n (n − 1) / 2 degrees of freedom.

`quasi=True` makes the 2 × 2 matrices free (4 (n − 1) numbers, the identity at the start): qGOFT. The paper adds a
penalty on the inner products of their columns to the loss, which is not here: a method does not see the loss.

The order of the stages is that of the paper's text and first code. That code squeezes angles through π tanh and scales
the inputs unless told not to. Trap: its version for PEFT 0.12 pairs neighbours at every stage, which gives no rotations
from stage 2 on. Cost: n − 1 numbers; 4 n multiply-adds a token in many small kernels. Not for narrow layers on a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "goft",
    title="GOFT",
    paper="Ma et al. 2024, arXiv:2404.04316",
    equation="W' = W Rᵀ, R = P_L … P_1, P_r = Π_k Givens(2^r k, 2^r k + 2^(r−1); θ_rk)",
    hypothesis="A task only needs its inputs turned, and one angle an input is enough to turn them.",
    family="rotation",
    rate=1e-2,
    paper_setting="DeBERTaV3, LLaMA-2-7B and ViT, both forms: strict rotations, as here, and quasi=True, which the "
    "paper trains with a penalty on α · β of each pair (not here); the larger the model, the better the strict form "
    "(paper, §4.2 and §5).",
)
@dataclass(frozen=True)
class GOFT(WeightMethod):
    """quasi: free 2 × 2 matrices in place of the rotations, see the module."""

    quasi: bool = False

    def check(self, m: int, n: int) -> str | None:
        return "an input of width 1 has no plane to turn in" if n < 2 else None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        planes = W.shape[1] - 1
        if self.quasi:
            return {"planes": nn.Parameter(torch.zeros(planes, 2, 2))}
        return {"angle": nn.Parameter(torch.zeros(planes))}

    def _stages(self, p: Params, n: int) -> list[Tensor]:
        """G = (cos −sin; sin cos) of every plane, (planes, 2, 2) for each stage, float32 at least."""
        if self.quasi:
            G = p["planes"].to(torch.promote_types(p["planes"].dtype, torch.float32))
            G = G + torch.eye(2, dtype=G.dtype, device=G.device)
        else:
            angle = p["angle"].to(torch.promote_types(p["angle"].dtype, torch.float32))
            cos, sin = angle.cos(), angle.sin()
            G = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
        sizes = []
        while n > 1:
            sizes.append(n // 2)
            n -= n // 2
        return list(G.split(sizes))

    def _turn(self, x: Tensor, stages: list[Tensor], back: bool = False) -> Tensor:
        """x R, where pairs turn on the way up; back: x Rᵀ, where they turn on the way down."""
        aside: list[Tensor] = []
        for G in stages:
            paired, alone = x[..., : 2 * len(G)], x[..., 2 * len(G) :]
            first, second = paired[..., 0::2], paired[..., 1::2]
            if back:
                first, second = _pairs(first, second, G.transpose(1, 2))
            aside.append(second)
            x = torch.cat([first, alone], -1)
        for G in reversed(stages):
            first, alone, second = x[..., : len(G)], x[..., len(G) :], aside.pop()
            if not back:
                first, second = _pairs(first, second, G)
            x = torch.cat([torch.stack([first, second], -1).flatten(-2), alone], -1)
        return x

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        return base(self._turn(x, [G.to(x.dtype) for G in self._stages(p, x.shape[-1])]))

    def effective(self, W: Tensor, p: Params) -> Tensor:
        return self._turn(W, self._stages(p, W.shape[1]), back=True)

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self.effective(W, p) - W

    def trainable(self, m: int, n: int) -> int:
        return (n - 1) * (4 if self.quasi else 1)


def _pairs(first: Tensor, second: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """(first second) G for every plane."""
    return first * G[:, 0, 0] + second * G[:, 1, 0], first * G[:, 0, 1] + second * G[:, 1, 1]
