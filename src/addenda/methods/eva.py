"""EVA: a LoRA that starts to look where its inputs vary most (Paischer et al. 2024, arXiv 2410.07170).

    X (tokens × n): a layer's inputs over the calibration batches;   XᵀX = V Λ Vᵀ
    ΔW = s B A,   A (r × n) starts as the r leading rows of Vᵀ,   B (m × r) at zero

Of all orthonormal rows these keep most of the inputs, Σ‖A x‖², and so give B the largest gradient to be expected from
gradients of y that know nothing of x. B = 0 makes the start exact. A is trained on like LoRA's.

rho > 1 also hands the ranks out anew, before training, the sum of them as it was: every direction of every layer has a
share λ_i / Σλ of its inputs' squares; the largest shares of all layers together get a rank each, at most rho · rank in
one layer, and a layer without any is left out of the adapter. The scale α/r stays that of the rank asked for, at every
site. `plan` sees no data and counts the ranks as they are asked for.

The paper finds V by an incremental decomposition that stops when it has converged, and PEFT centres the inputs first,
for the shares too; its rho is 2 by default. Here XᵀX is summed as it is, over all inputs of all batches, padding left
out, and decomposed in float64; layers with the same inputs get their ranks in the model's order.

With fewer tokens than r, the last rows are any that complete a basis, which the inputs seen do not touch.

Cost: r (m + n) numbers a site, two rank-r products a pass. The calibration pass needs no gradients, but keeps n² floats
for every site, and the decomposition takes n³ operations (with rho, the eigenvalues once more). Only layers that
multiply their input by W have inputs to look at: no embeddings, convolutions or raw parameters.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import on_cpu
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params, Shape, WeightMethod
from addenda.core.method.lowrank import LowRank


@register(
    "eva",
    title="EVA",
    paper="Paischer et al. 2024, arXiv:2410.07170",
    equation="ΔW = (α/r) B A, A from the leading right singular vectors of the layer's inputs",
    hypothesis="The change has low rank and reads its inputs along the directions in which they vary most.",
    family="low-rank",
    rate=3e-3,
    paper_setting="r = 16 with ranks handed out anew, rho = 2 (here r = 8 and rho = 1), α = 1 (here α = r), on all "
    "linear layers with the head, rate 5e-4 (paper, §4.1 and table 4).",
)
@dataclass(frozen=True)
class EVA(LowRank):
    """rho: how many times its rank a site may get when ranks are handed out; 1: they are not. Others: see `LowRank`."""

    rho: float = 1.0

    def validate(self):
        yield from super().validate()
        if self.rho < 1:
            yield f"rho must be at least 1, got {self.rho}"

    @property
    def calibration(self) -> Literal["input"]:
        return "input"

    def calibrate(self, W: Tensor, X: Tensor, seen: Tensor | None) -> Tensor:
        squares = X.mT @ X
        return squares if seen is None else seen + squares

    def allot(self, shapes: list[Shape], seen: list[Tensor]) -> list[WeightMethod | None]:
        if self.rho == 1:
            return [self for _ in shapes]
        shares = []
        for (m, n), squares in zip(shapes, seen, strict=True):
            found = torch.linalg.eigvalsh(squares.cpu().double()).clamp_min(0).flip(0)
            shares.append((found / found.sum())[: min(round(self.rho * self.rank), m, n)])
        site = torch.repeat_interleave(torch.tensor([len(s) for s in shares]))
        best = torch.cat(shares).argsort(descending=True, stable=True)[: self.rank * len(shapes)]
        ranks = torch.bincount(site[best], minlength=len(shapes)).tolist()
        return [self._with(rank) if rank else None for rank in ranks]

    def _with(self, rank: int) -> "EVA":
        """The same scale at another rank."""
        alpha = None if self.alpha is None else self.alpha * rank / self.rank
        return dataclasses.replace(self, rank=rank, alpha=alpha, rho=1.0)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        V = torch.linalg.eigh(on_cpu(p["calibration"]).double()).eigenvectors  # eigenvalues rise
        A = V[:, -self.rank :].flip(1).T
        largest = A.gather(1, A.abs().argmax(1, keepdim=True))
        A = torch.where(largest < 0, -A, A)  # a direction has no sign: its largest entry becomes positive
        return {"A": nn.Parameter(A.float()), "B": nn.Parameter(torch.zeros(len(W), self.rank))}
