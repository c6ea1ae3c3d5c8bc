"""PSOFT: a rotation among W's r principal directions (Wu et al. 2025, arXiv 2505.11235).

    W ≈ U Σ Vᵀ (r largest singular triplets),   ΔW = U Σ (C − I) Vᵀ,   C = diag(1 + b) R diag(1 + a)

    x ── Vᵀ (r × n) ── C − I (r × r) ── U Σ (m × r) ──┐        R = (I + Q)(I − Q)⁻¹,  Q skew-symmetric
    └────────────────────── W ────────────────────────┴── y

Σ stands on the output's side, so that an orthogonal C keeps the norms of the principal part's rows and the angles
between them. The vectors a and b relax that (`vectors=False`: strictly orthogonal). Q, a and b start at 0, where
C − I is 0 exactly; W stays as it is, there is no residual.

R has the sign of the paper (whose W is transposed) and of PEFT, whose psoft_init this is (alpha cancels there). Not
here: PEFT's pissa_init, which keeps no angles, and the Neumann series in place of the solve. Singular vectors are found
again at load; their signs are fixed (`core.base.linalg`), and PEFT's may differ.
Cost: r (r − 1) / 2 + 2 r numbers; r (m + n) of memory and multiply-adds a token, as a LoRA of that rank. Not for
changes outside the principal directions.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import cayley, singular_triplets, skew_symmetric
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod, too_high


@register(
    "psoft",
    title="PSOFT",
    paper="Wu et al. 2025, arXiv:2505.11235",
    equation="ΔW = U Σ (diag(1 + b) R diag(1 + a) − I) Vᵀ, U Σ Vᵀ the r largest singular triplets of W",
    hypothesis="The change turns W's principal input directions into each other and leaves the rest alone.",
    family="rotation",
    rate=1e-2,
    paper_setting="r = 46 on DeBERTaV3 and ViT, 352 on LLaMA-3.2-3B, all linear layers, and 424 on q, k, v, up and "
    "down of LLaMA-3.1-8B (here 32), Cayley by 5 terms of a series (here exact) (paper, tables 2 to 5; release's "
    "scripts).",
)
@dataclass(frozen=True)
class PSOFT(WeightMethod):
    """rank: how many principal directions. vectors: train a and b too."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 32
    vectors: bool = True

    def validate(self):
        if self.rank < 2:
            yield f"rank must be at least 2, one plane to turn in, got {self.rank}"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        U, S, Vt = singular_triplets(W, self.rank)
        return {"B": (U * S).to(W.dtype), "A": Vt.to(W.dtype)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        own: Params = {"skew": nn.Parameter(torch.zeros(self.rank * (self.rank - 1) // 2))}
        if self.vectors:
            own |= {"a": nn.Parameter(torch.zeros(self.rank)), "b": nn.Parameter(torch.zeros(self.rank))}
        return own

    def _turn(self, p: Params) -> Tensor:
        """C (r × r), in the dtype of the parameters, float32 at least."""
        C = cayley(-skew_symmetric(p["skew"], self.rank))
        return (1 + p["b"])[:, None] * C * (1 + p["a"]) if self.vectors else C

    def factors(self, p: Params, shape: Shape) -> Factors:
        C = self._turn(p)
        middle = C - torch.eye(self.rank, dtype=C.dtype, device=C.device)
        return Factors(p["B"], p["A"], middle.flatten(), torch.arange(self.rank**2, device=C.device))

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (self.rank - 1) // 2 + (2 * self.rank if self.vectors else 0)
