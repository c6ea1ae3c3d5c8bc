"""SSVD: W's leading input directions turn, and its singular values shift (Wang et al. 2025, arXiv 2509.02830).

    W = U Σ Vᵀ,   W' = U (Σ + diag(d)) G Vᵀ   in the k leading triplets;  so  ΔW = U ((Σ + diag(d)) G − Σ) Vᵀ

    x ── Vᵀ (k × n) ── (Σ + D) G − Σ (k × k) ── U (m × k) ──┐
    └─────────────────────────── W ─────────────────────────┴── y

The directions of the output stay as they are, those of the input turn among themselves. G is one of the paper's three
forms: "strict" G = (I − K)(I + K)⁻¹ with K skew-symmetric; "approx" G = I − 2K, off by 2K² + …, which its main tables
use; "none" G = I + E, any matrix. All start at 0, where ΔW is 0 exactly. The paper chooses k as a share of min(m, n),
17 to 80 percent.

ESPnet's code has "approx" alone, starts d at random numbers times a gate of ½, which stands in no equation (so it does
not start at the base), and turns the output's directions where W is wider than tall. Here it is the equation.
Cost: k (k + 1) / 2 numbers ("none": k² + k); k (m + n) of memory and multiply-adds a token. Not for changes that need
new output directions.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import cayley, singular_triplets, skew_symmetric
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod, too_high


@register(
    "ssvd",
    title="SSVD",
    paper="Wang et al. 2025, arXiv:2509.02830",
    equation="ΔW = U ((Σ + diag(d)) G − Σ) Vᵀ, U Σ Vᵀ the k largest singular triplets of W, G a rotation",
    hypothesis="A new domain turns and stretches what comes in; what the outputs mean stays.",
    family="spectral",
    rate=1e-2,
    paper_setting="speech recognition: k is a share of each layer's triplets, 40 to 80 % of OWSM-0.1B, 22 to 40 % at "
    "1B, 17 to 25 % at 2B (here 32 of them), on all linear layers, G = I − 2K (constraint='approx'; here strict) "
    "(paper, §III-B and §IV-B).",
)
@dataclass(frozen=True)
class SSVD(WeightMethod):
    """rank: the number k of triplets. constraint: the form of G, see the module."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 32
    constraint: Literal["strict", "approx", "none"] = "strict"

    def validate(self):
        if self.rank < 2:
            yield f"rank must be at least 2, one plane to turn in, got {self.rank}"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        U, S, Vt = singular_triplets(W, self.rank)
        return {"U": U.to(W.dtype), "sigma": S.to(W.dtype), "Vt": Vt.to(W.dtype)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        k = self.rank
        turn = torch.zeros(k, k) if self.constraint == "none" else torch.zeros(k * (k - 1) // 2)
        return {"turn": nn.Parameter(turn), "shift": nn.Parameter(torch.zeros(k))}

    def _rotation(self, p: Params) -> Tensor:
        """G (k × k), in the dtype of the parameters, float32 at least."""
        turn, k = p["turn"], self.rank
        if self.constraint == "strict":
            return cayley(skew_symmetric(turn, k))
        eye = torch.eye(k, dtype=torch.promote_types(turn.dtype, torch.float32), device=turn.device)
        return eye + turn if self.constraint == "none" else eye - 2 * skew_symmetric(turn, k)

    def factors(self, p: Params, shape: Shape) -> Factors:
        G = self._rotation(p)
        sigma = p["sigma"].to(G.dtype)
        middle = (sigma + p["shift"])[:, None] * G - torch.diag(sigma)
        return Factors(p["U"], p["Vt"], middle.flatten(), torch.arange(self.rank**2, device=G.device))

    def trainable(self, m: int, n: int) -> int:
        k = self.rank
        return k + (k * k if self.constraint == "none" else k * (k - 1) // 2)
