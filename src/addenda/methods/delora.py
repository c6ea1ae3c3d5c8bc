"""DeLoRA: rank-one parts of norm one, times a trained strength (Bini et al. 2025, arXiv 2503.18225).

    D = (λ/r) Σ_i b̂_i â_iᵀ diag(w),   b̂ = b/‖b‖, â = a/‖a‖        ΔW = D − D at the start

    x (…, n) ── ∘ w ── â (r × n) ── b̂ (m × r) ── · λ/r ──┐
         └────────────────── W (m × n) ──────────────────┴── y

The learning rate turns the parts, λ alone says how far they reach. A and B start Kaiming-uniform, from the seed. The
paper takes the change of the start out of W; here it is taken out of ΔW, and the offsets from A0, B0 and λ0 are
trained. With b̂ â − b̂0 â0 = b̂ (â − â0) + (b̂ − b̂0) â0 this is a product of rank 2r, exactly zero at the start, for the
same gradients, and the base stays as it is. Weight decay pulls towards the start.

The paper multiplies by the norm of W, which bounds ‖D‖ by λ‖W‖ (norm="whole"). Its code and PEFT multiply every input
by the norm of its own column of W, and the strengths of 10 to 15 that go round belong to that (the default).
Trap: PEFT starts from B = 0 and keeps norms above 1e-4, so its first step takes ΔW from zero to full strength whatever
the learning rate.

Cost: r (m + n) + 1 numbers a site; a pair of frozen factors beside the trained ones; two rank-2r products a pass.
Not where the size of the change must be free.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod, too_high


@register(
    "delora",
    title="DeLoRA",
    paper="Bini et al. 2025, arXiv:2503.18225",
    equation="ΔW = D − D0, D = (λ/r) Σ b̂_i â_iᵀ diag(w), w the column norms of W",
    hypothesis="The change is low-rank, and its directions should be learned apart from its size.",
    family="low-rank",
    rate=3e-3,
    paper_setting="r = 8, as here: on query and value of RoBERTa-base with λ = 4 or 12 (here 15) and a rate of λ's "
    "own up to 3 times the others' (release's script), and on LLaMA-2; r = 16 for images (paper, §3.3).",
)
@dataclass(frozen=True)
class DeLoRA(WeightMethod):
    """strength: λ at the start. norm: what w is, the norms of W's columns or the one of W for all columns."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 8
    strength: float = 15.0
    norm: Literal["columns", "whole"] = "columns"

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.strength <= 0:
            yield f"strength must be above 0, got {self.strength}"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        m, n = W.shape
        w = torch.linalg.vector_norm(W, dim=0 if self.norm == "columns" else None)
        return {"A0": rng.kaiming_uniform(self.rank, n), "B0": rng.kaiming_uniform(m, self.rank), "w": w}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {  # offsets
            "A": nn.Parameter(torch.zeros(self.rank, n)),
            "B": nn.Parameter(torch.zeros(m, self.rank)),
            "strength": nn.Parameter(torch.zeros(())),
        }

    def factors(self, p: Params, shape: Shape) -> Factors:
        wide = torch.promote_types(p["A"].dtype, torch.float32)  # bfloat16 would lose small offsets
        A0, B0, w = p["A0"].to(wide), p["B0"].to(wide), p["w"].to(wide) / self.rank
        a, a0 = _unit(A0 + p["A"], 1) * w, _unit(A0, 1) * w
        b, b0 = (self.strength + p["strength"]) * _unit(B0 + p["B"], 0), self.strength * _unit(B0, 0)
        return Factors(torch.cat([b, b - b0], 1), torch.cat([a - a0, a0]))

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n) + 1


def _unit(t: Tensor, dim: int) -> Tensor:
    return t / torch.linalg.vector_norm(t, dim=dim, keepdim=True)
