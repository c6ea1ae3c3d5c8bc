"""LoKr: a Kronecker product whose larger factor is low-rank (Yeh et al. 2023, LyCORIS, arXiv 2309.14859).

    ΔW = s C ⊗ (B A)        C: u × u';   B A: m/u × n/u', of rank r

    x as u' rows of n/u' ── A ── C across the rows ── B ── u rows of m/u ── · s ──┐
         └────────────────────────────── W (m × n) ───────────────────────────────┴── y

u is the largest divisor of m that is at most √m (and at most `factor`), u' that of n, so C is the smaller factor. Ranks
multiply: up to min(u, u') r. Where B A would have more numbers than its product, the product itself is trained, as B.
rank=None always trains it: that is KronA (Edalati et al. 2022, 2212.10650). On activations ΔW is never formed: the
product with C runs between A and B. C starts at zero as in PEFT, the rest Kaiming-uniform, so the start is exact; with
init_weights="lycoris" PEFT starts B A at zero instead.

Traps: PEFT takes a `factor` that divides a width as it is, even above the square root, where the paper takes the
largest divisor below it. Prime widths have no divisor, and C shrinks to one row.

Cost: u u' + r (m/u + n/u') numbers a site; r (m + n) multiply-adds a token. All blocks of ΔW are multiples of one
matrix: not for changes that differ from block to block.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register, variant
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "lokr",
    title="LoKr",
    paper="Yeh et al. 2023, arXiv:2309.14859",
    equation="ΔW = (α/r) C ⊗ (B A)",
    hypothesis="The change repeats one low-rank pattern over the whole weight, each time with its own factor.",
    family="block",
    rate=1e-2,
    paper_setting="Stable Diffusion: factor 8 and a full second factor (rank=None), down to 4 for more capacity "
    "(here nearly square, rank 8), rates of 1e-4 to 1e-3 (paper, §5).",
)
@dataclass(frozen=True)
class LoKr(WeightMethod):
    """rank: of the second factor, None for a full one. alpha: None means scale 1. factor: the most rows C may have."""

    sized_by: ClassVar[str] = "rank"
    helpers: ClassVar[tuple[str, ...]] = ("scale",)
    rank: int | None = 8
    alpha: float | None = None
    factor: int | None = None

    def validate(self):
        for name, value in (("rank", self.rank), ("factor", self.factor)):
            if value is not None and value < 1:
                yield f"{name} must be at least 1, got {value}"
        if self.alpha is not None and self.alpha <= 0:
            yield f"alpha must be above 0, got {self.alpha}"

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / (self.rank or 1)

    def _split(self, width: int) -> tuple[int, int]:
        """Two factors of a width, the smaller first."""
        most = math.isqrt(width) if self.factor is None else min(self.factor, math.isqrt(width))
        u = next(u for u in range(most, 0, -1) if width % u == 0)
        return u, width // u

    def _inner(self, rows: int, columns: int) -> int:
        """The rank of the second factor; 0 where it is trained whole."""
        rank = self.rank or 0
        return rank if rank * (rows + columns) < rows * columns else 0

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        (u, rows), (v, columns) = map(self._split, W.shape)
        own: Params = {"C": nn.Parameter(torch.zeros(u, v))}
        rank = self._inner(rows, columns)
        own["B"] = nn.Parameter(rng.kaiming_uniform(rows, rank or columns))
        if rank:
            own["A"] = nn.Parameter(rng.kaiming_uniform(rank, columns))
        return own

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return torch.kron(self.scale * p["C"], p["B"] @ p["A"] if "A" in p else p["B"])

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        C, B = (self.scale * p["C"]).to(x.dtype), p["B"].to(x.dtype)
        (u, v), inner, y = C.shape, B.shape[1], base(x)
        h = x.reshape(-1, x.shape[-1] // v)  # two dimensions: with more, torch sums in another order without gradients
        if "A" in p:
            h = h @ p["A"].to(x.dtype).T
        h = h.view(-1, v, inner).transpose(1, 2).reshape(-1, v) @ C.T
        h = h.view(-1, inner, u).transpose(1, 2).reshape(-1, inner) @ B.T
        return y + h.view(y.shape)

    def trainable(self, m: int, n: int) -> int:
        (u, rows), (v, columns) = self._split(m), self._split(n)
        return u * v + (self._inner(rows, columns) * (rows + columns) or rows * columns)


variant(
    "krona",
    LoKr,
    {"rank": None},
    title="KronA",
    paper="Edalati et al. 2022, arXiv:2212.10650",
    equation="ΔW = s C ⊗ B",
    hypothesis="The change repeats one pattern over the whole weight, each time with its own factor.",
    paper_setting="T5 on GLUE (abstract; its text was not checked). Others' code puts it on query and value with a "
    "tuned scale; here every linear layer, nearly square factors and s = 1.",
)
