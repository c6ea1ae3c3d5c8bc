"""LoRA-XS: one small trained matrix between W's own principal directions (Bałazy et al. 2024, arXiv 2405.17604).

    ΔW = s U_r R Σ_r V_rᵀ,   s = α/r        U_r Σ_r V_rᵀ: the r largest singular triplets of W;  R: r × r

    x (…, n) ── Σ_r V_rᵀ (r × n) ── R (r × r) ── U_r (m × r) ── · s ──┐
         └────────────────────────── W (m × n) ───────────────────────┴── y

Only R is trained. It starts at zero, so the start is exact; the paper starts it from N(0, 1e-5²). The gradient is alive
from the first step, as both sides of R are fixed and not zero. The triplets come from W at load and are never saved;
the sign of a pair is fixed by `singular_triplets`.

Cost: r² numbers a site, whatever its size; r (m + n) floats of memory and multiply-adds a token. No new directions: not
for changes outside the principal ones of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, too_high
from addenda.core.method.lowrank import Ranked


@register(
    "lora-xs",
    title="LoRA-XS",
    paper="Bałazy et al. 2024, arXiv:2405.17604",
    equation="ΔW = (α/r) U_r R Σ_r V_rᵀ",
    hypothesis="The change only mixes the principal singular directions of W among each other.",
    family="spectral",
    rate=3e-3,
    paper_setting="R from N(0, 1e-5²), not from 0, and α = 16 (here α = r); r from 4 to 25 (here 16) on query, "
    "value, attention's and the MLP's output of RoBERTa-large, on all linear layers of LLaMA-3 (release's scripts).",
)
@dataclass(frozen=True)
class LoRAXS(Ranked):
    """rank: the side r of R. alpha: None means alpha = rank (scale 1)."""

    rank: int = 16

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        U, S, Vt = singular_triplets(W, self.rank)
        return {"A": (S[:, None] * Vt).to(W.dtype), "B": U.to(W.dtype)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"R": nn.Parameter(torch.zeros(self.rank, self.rank))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        every = torch.arange(self.rank**2, device=p["R"].device)
        return Factors(p["B"], p["A"], self.scale * p["R"].flatten(), every)

    def trainable(self, m: int, n: int) -> int:
        return self.rank**2
