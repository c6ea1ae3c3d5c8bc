"""EVA: a LoRA that starts to look where its inputs vary most (Paischer et al. 2024, arXiv 2410.07170).

    X (tokens × n): a layer's inputs over the calibration batches;   XᵀX = V Λ Vᵀ
    ΔW = s B A,   A (r × n) starts as the r leading rows of Vᵀ,   B (m × r) at zero

Of all orthonormal rows these keep most of the inputs, Σ‖A x‖², and so give B the largest gradient to be expected from
gradients of y that know nothing of x. B = 0 makes the start exact. A is trained on like LoRA's.

Built here: the start, from all inputs of all batches, padding left out. Not built: the paper's second half, which
takes ranks from sites whose inputs need few directions and gives them to others (rho in PEFT); every site has the same
rank here. The paper finds V by an incremental decomposition that stops when it has converged, and PEFT centres the
inputs first; here XᵀX is summed as it is and decomposed once, in float64.

With fewer tokens than r, the last rows are any that complete a basis, which the inputs seen do not touch.

Cost: r (m + n) numbers a site, two rank-r products a pass. The calibration pass needs no gradients, but keeps n² floats
for every site, and the decomposition takes n³ operations. Only layers that multiply their input by W have inputs to
look at: no embeddings, convolutions or raw parameters.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.lowrank import LowRank
from addenda.core.method import Params
from addenda.core.random import Stream
from addenda.core.registry import register


@register(
    "eva",
    title="EVA",
    paper="Paischer et al. 2024, arXiv:2410.07170",
    equation="ΔW = (α/r) B A, A from the leading right singular vectors of the layer's inputs",
    hypothesis="The change has low rank and reads its inputs along the directions in which they vary most.",
    family="low-rank",
    rate=3e-3,
)
@dataclass(frozen=True)
class EVA(LowRank):
    """Options: see `LowRank`."""

    @property
    def calibration(self) -> Literal["input"]:
        return "input"

    def calibrate(self, W: Tensor, X: Tensor, seen: Tensor | None) -> Tensor:
        squares = X.mT @ X
        return squares if seen is None else seen + squares

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        V = torch.linalg.eigh(p["calibration"].cpu().double()).eigenvectors  # eigenvalues rise
        A = V[:, -self.rank :].flip(1).T
        largest = A.gather(1, A.abs().argmax(1, keepdim=True))
        A = torch.where(largest < 0, -A, A)  # a direction has no sign: its largest entry becomes positive
        return {"A": nn.Parameter(A.float()), "B": nn.Parameter(torch.zeros(len(W), self.rank))}
