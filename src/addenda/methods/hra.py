"""HRA: W is multiplied by a chain of r reflections (Yuan et al. 2024, arXiv 2405.17484).

    W' = W R,   R = H(u_1) H(v_1) … H(u_k) H(v_k),   H(u) = I − 2 u uᵀ / ‖u‖²,   k = r/2,   v_i = u_i at the start

R is orthogonal, and R − I has rank r at most: OFT and a LoRA at once. Two equal reflections cancel, but not in floating
point; so a pair is written with the difference d = v − u of its unit vectors, which is exactly 0 at the start,

    H(u) H(v) = I + 2 (u dᵀ − d vᵀ − ‖d‖² u vᵀ) = I + [u d] [c e]ᵀ,   c = 2 d − 2 ‖d‖² v,   e = −2 v

and the chain as R = I + Bᵀ Y with two r × n matrices (the compact WY form): rows u_i, d_i in B, and Y solves a
triangular system of r rows whose right side is c_i, e_i. On activations y = (x + (x Yᵀ) B) Wᵀ, two thin products.

The vectors are drawn as PEFT draws them, so that learning rates mean the same; only directions matter. PEFT forms the
n × n matrix R in every pass. Not here: its `apply_GS` (the paper's λ = ∞), whose reflections along orthogonal vectors
cannot cancel at the start, and the penalty ‖I − UᵀU‖² of 0 < λ < ∞, since a method does not see the loss.
Cost: r n numbers; 2 r n multiply-adds a token. Cannot change singular values.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "hra",
    title="HRA",
    paper="Yuan et al. 2024, arXiv:2405.17484",
    equation="W' = W Π H(u_i) H(v_i), H(u) = I − 2 u uᵀ / ‖u‖²",
    hypothesis="A task only needs its inputs turned, and only within a few directions of their space.",
    family="rotation",
    rate=1e-2,
    paper_setting="DeBERTaV3: r = 8, as here; query and value of LLaMA-2-7B: r = 32, or 16 and 8, with a penalty of "
    "orthogonality of weight 1e-5 to 1e-3 (not here), rate 1e-5 in the release's script, which leaves the penalty out "
    "(paper, §4).",
)
@dataclass(frozen=True)
class HRA(WeightMethod):
    """rank: the number r of reflections, even: they start in pairs that cancel."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 8

    def validate(self):
        if self.rank < 2 or self.rank % 2:
            yield f"rank must be even and at least 2, got {self.rank}"

    def check(self, m: int, n: int) -> str | None:
        return f"rank {self.rank} is above the input width {n}" if self.rank > n else None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        bound = (2 / self.rank) ** 0.5
        u = rng.uniform(self.rank // 2, W.shape[1], low=-bound, high=bound)
        return {"u": nn.Parameter(u), "v": nn.Parameter(u.clone())}

    def _thin(self, p: Params) -> tuple[Tensor, Tensor]:
        """(B, Y), each r × n, with R = I + Bᵀ Y, in the dtype of the parameters, float32 at least."""
        wide = torch.promote_types(p["u"].dtype, torch.float32)
        u, v = F.normalize(p["u"].to(wide), dim=1), F.normalize(p["v"].to(wide), dim=1)
        d = v - u
        B = torch.stack([u, d], 1).flatten(0, 1)
        C = torch.stack([2 * d - 2 * d.square().sum(1, keepdim=True) * v, -2 * v], 1).flatten(0, 1)
        pair = torch.arange(self.rank, device=B.device) // 2
        N = (C @ B.T) * (pair[:, None] < pair)  # how a pair sees those after it
        eye = torch.eye(self.rank, dtype=B.dtype, device=B.device)
        return B, torch.linalg.solve_triangular(eye - N, C, upper=True, unitriangular=True)

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        B, Y = self._thin(p)
        return base(x + F.linear(x, Y.to(x.dtype)) @ B.to(x.dtype))

    def delta(self, W: Tensor, p: Params) -> Tensor:
        B, Y = self._thin(p)
        return (W @ B.T) @ Y

    def trainable(self, m: int, n: int) -> int:
        return self.rank * n
