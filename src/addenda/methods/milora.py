"""MiLoRA: a LoRA that starts from the smallest singular triplets of W (Wang et al. 2024, arXiv 2406.09044).

    s B0 A0 = the r smallest singular triplets of W,   B0 = U √(Σ/s),  A0 = √(Σ/s) Vᵀ
    ΔW = s ((B0 + dB) (A0 + dA) − B0 A0) = s (B dA + dB A0),   B = B0 + dB

The paper trains B and A beside W without these triplets. Here the offsets dA and dB are trained, from zero: the same
model and the same gradients, but the base stays as it is and the start is exactly zero in every dtype. Weight decay
pulls towards the start. Traps: the directions of small singular values are the least certain ones, and equal ones may
turn between machines (save with basis=True where that matters). Where W lacks r ranks, B0 and A0 are zero and nothing
learns: such a weight is refused when it is attached.

Cost: r (m + n) numbers a site, two rank-2r products a pass, and a full decomposition of W in float64 at load, which
takes seconds for wide layers. Not for tasks that must change what W does most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.core.method.lowrank import LowRank


@register(
    "milora",
    title="MiLoRA",
    paper="Wang et al. 2024, arXiv:2406.09044",
    equation="ΔW = s ((B0+dB)(A0+dA) − B0 A0), s B0 A0 the r smallest singular triplets of W",
    hypothesis="What W does least is free to be changed: the change lies near its minor singular directions.",
    family="low-rank",
    rate=3e-3,
    paper_setting="the release's README: r = 64 with α = r (here 8) on q, k, v, up and down for mathematics, rate "
    "3e-4, dropout 0.05, batch 16, as a script in a copy of it has them; commonsense tasks by the scripts of "
    "LLM-Adapters, whose rank was not checked.",
)
@dataclass(frozen=True)
class MiLoRA(LowRank):
    """Options: see `LowRank`."""

    def derive(self, W: Tensor, rng: Stream) -> Params:
        U, S, Vt = singular_triplets(W)
        if S[-self.rank] <= torch.finfo(torch.float32).eps * S[0]:
            raise AddendaError(
                f"milora: the {self.rank} smallest singular values of a {len(W)} × {W.shape[1]} weight are all zero, "
                "so nothing would learn. Use another method for weights of low rank."
            )
        root = (S[-self.rank :] / self.scale).sqrt()
        A0, B0 = root[:, None] * Vt[-self.rank :], U[:, -self.rank :] * root
        return {"A0": A0.to(W.dtype), "B0": B0.to(W.dtype)}
