"""BOFT: OFT whose rotation is a product of f butterfly levels (Liu et al. 2023, arXiv 2311.06243).

    W' = W Rᵀ,   R = B_f … B_2 B_1      level i turns blocks of b entries, each by a Cayley rotation as in OFT

    level 1       level 2         level 3                   (b = 2, n = 8: which entries share a block)
    01 23 45 67   02 13  46 57    04 15 26 37               b > 2: the same with b/2 neighbours for every entry

On activations it is y = (x B_f … B_1) Wᵀ. A level joins entries that the one before kept apart: with f levels every
entry reaches 2^(f−1) b others, and all n of them with f = log2(n/b) + 1, for f n (b − 1) / 2 numbers. All angles start
at 0, where R is the identity exactly. One level is OFT. Levels are reshapes: nothing of size n × n is formed.

With `scale=True` every row of W' gets a trained factor too, W' = diag(1 + s) W Rᵀ, as PEFT always does. The paper
counts rotations alone, and so is the default here.

PEFT stores whole b × b blocks for Q, of which half is used, and f dense n × n permutations; where its CUDA kernel does
not compile it runs one level, with a warning. Cost: f n b multiply-adds a token, and f inputs kept for backward. Not
for speed: one level of larger blocks (OFT) is one product. Cannot change singular values unless it scales.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import cayley, skew_symmetric
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "boft",
    title="BOFT",
    paper="Liu et al. 2023, arXiv:2311.06243",
    equation="W' = W Rᵀ, R = B_f … B_1, B_i a permuted blockdiag(Cayley(Q_ij))",
    hypothesis="A task only needs its inputs turned together, in the few steps of a fast transform.",
    family="rotation",
    rate=1e-2,
    published="DeBERTaV3, GLUE: full fine-tuning 88.25, LoRA 88.50, OFT 89.77, BOFT 89.89 (paper). PEFT's own "
    "benchmark, Llama-3.2-3B, GSM8K: BOFT 0.343 in 6,926 s, LoRA r = 32 0.478 in 942 s.",
    paper_setting="DeBERTaV3: two factors with blocks of 8, as here, on all linear layers.",
)
@dataclass(frozen=True)
class BOFT(WeightMethod):
    """block: the side b of the square blocks, even. levels: the number f of factors. scale: factors for the rows."""

    sized_by: ClassVar[str] = "block"
    block: int = 8
    levels: int = 2
    scale: bool = False

    def validate(self):
        if self.block < 2 or self.block % 2:
            yield f"block must be even and at least 2, got {self.block}"
        if self.levels < 1:
            yield f"levels must be at least 1, got {self.levels}"

    def check(self, m: int, n: int) -> str | None:
        if self.levels > n.bit_length() or n % (self.block << (self.levels - 1)):
            return f"block · 2^(levels − 1) = {self.block} · 2^{self.levels - 1} does not divide the input width {n}"
        return None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        own: Params = {"skew": nn.Parameter(torch.zeros(self.levels, n // self.block, self._angles))}
        if self.scale:
            own["scale"] = nn.Parameter(torch.zeros(m))
        return own

    @property
    def _angles(self) -> int:
        return self.block * (self.block - 1) // 2

    def _rotations(self, p: Params) -> Tensor:
        """The blocks of every level, (f, n/b, b, b), in the dtype of the parameters, float32 at least."""
        return cayley(skew_symmetric(p["skew"], self.block))

    def _level(self, x: Tensor, blocks: Tensor, level: int) -> Tensor:
        """x B: in chunks of b · 2^level entries, the j-th b/2 entries of both halves are turned together."""
        b, n, stride = self.block, x.shape[-1], 2**level
        halves = x.reshape(-1, n // (b * stride), 2, stride, b // 2).transpose(2, 3)
        turned = halves.reshape(-1, n // b, b).transpose(0, 1) @ blocks
        return turned.transpose(0, 1).reshape(halves.shape).transpose(2, 3).reshape(x.shape)

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        blocks = self._rotations(p).to(x.dtype)
        for level in reversed(range(self.levels)):
            x = self._level(x, blocks[level], level)
        y = base(x)
        if not self.scale:
            return y
        return y + p["scale"].to(y.dtype) * (y if base.bias is None else y - base.bias)

    def effective(self, W: Tensor, p: Params) -> Tensor:
        blocks = self._rotations(p).transpose(2, 3)
        for level in range(self.levels):
            W = self._level(W, blocks[level], level)
        return (1 + p["scale"])[:, None] * W if self.scale else W

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self.effective(W, p) - W

    def trainable(self, m: int, n: int) -> int:
        return self.levels * (n // self.block) * self._angles + (m if self.scale else 0)
