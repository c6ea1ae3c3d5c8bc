"""NOLA: a LoRA whose factors are mixtures of random ones (Koohpayegani et al. 2023, arXiv 2310.02556).

    ΔW = s (Σ_j β_j B_j) (Σ_i α_i A_i),   s = α/r        A_i: r × n;  B_j: m × r;  only α_i and β_j are trained

Any number of coefficients can be trained, below what a LoRA of rank 1 needs. The A_i and B_j are Kaiming-uniform, from
the seed and never saved. They are drawn once, for the widest input and the tallest output, and all sites share them, as
VeRA does; the paper draws them for every layer and makes them anew in every pass.

The α_i start at 1/√K, so that their mixture has the size of one A_i, and the β_j at zero: the start is exact and the
β_j learn at once. The releases differ: those for GPT-2 and vision start both at 1/K, away from the base; that for LLaMA
adds a frozen Kaiming A to the mixture and starts both at zero.

Cost: 2 K numbers a site for K = `basis`; K r (m + n) random numbers in memory, once for all sites (of the largest
shape), and as many multiply-adds a pass; two rank-r products. Not where memory is short.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, too_high
from addenda.core.method.lowrank import Ranked


@register(
    "nola",
    title="NOLA",
    paper="Koohpayegani et al. 2023, arXiv:2310.02556",
    equation="ΔW = (α/r) (Σ β_j B_j)(Σ α_i A_i), A_i and B_j random",
    hypothesis="Good low-rank changes are plentiful: mixtures of a few hundred random ones reach some.",
    family="low-rank",
    rate=1e-2,
    paper_setting="512 matrices in each basis (here 256), on query and value of GPT-2 with r = 8, α = 8 and rate "
    "5e-3, of LLaMA-2 with r = 16 and α = 4 (release's scripts; the paper's tables were not checked).",
)
@dataclass(frozen=True)
class NOLA(Ranked):
    """basis: how many random matrices are mixed, on each side. alpha: None means alpha = rank (scale 1)."""

    sized_by: ClassVar[str] = "basis"
    basis: int = 256

    def validate(self):
        yield from super().validate()
        if self.basis < 1:
            yield f"basis must be at least 1, got {self.basis}"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def shared(self, shapes: list[Shape], rng: Stream) -> Params:
        m, n = (max(sizes) for sizes in zip(*shapes, strict=True))
        a, b = n**-0.5, self.rank**-0.5
        return {  # in this order of dimensions, the part of a smaller site is contiguous
            "A": rng.uniform(n, self.rank, self.basis, low=-a, high=a),
            "B": rng.uniform(m, self.rank, self.basis, low=-b, high=b),
        }

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        a = torch.full((self.basis,), self.basis**-0.5)
        return {"a": nn.Parameter(a), "b": nn.Parameter(torch.zeros(self.basis))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        A, B = p["A"][: shape[1]], p["B"][: shape[0]]
        return Factors(B @ (self.scale * p["b"]).to(B.dtype), (A @ p["a"].to(A.dtype)).T)

    def trainable(self, m: int, n: int) -> int:
        return 2 * self.basis
