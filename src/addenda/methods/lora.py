"""LoRA: ΔW = s B A, a low-rank change (Hu et al. 2021, arXiv 2106.09685; s = α/√r: Kalajdzievski 2023, 2312.03732).

    x ── A (r × n) ── B (m × r) ── · s ──┐
    └───────────── W (m × n) ────────────┴── y

A starts Kaiming-uniform, B at zero, so the change starts at zero. With `origin="pissa"` (Meng et al. 2024, 2404.02948)
the factors start from the r largest singular triplets of W. The paper subtracts s B0 A0 from W; here the offsets dA and
dB are trained instead, ΔW = s (B dA + dB A0) = s [B0 + dB | dB] [dA ; A0]: the same model, the same gradients, but the
base stays as it is and the start is exactly zero in every dtype.

Cost: r (m + n) numbers a site; two rank-r products a pass (rank 2r with PiSSA). Not for changes of high rank.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.linalg import singular_triplets
from addenda.core.method import Factors, Params, Shape, WeightMethod, too_high
from addenda.core.random import Stream
from addenda.core.registry import register, variant


@register(
    "lora",
    title="LoRA",
    paper="Hu et al. 2021, arXiv:2106.09685",
    equation="ΔW = (α/r) B A",
    hypothesis="The change that a task needs has low rank, in directions that need not be those of W.",
    family="low-rank",
    rate=3e-3,
)
@dataclass(frozen=True)
class LoRA(WeightMethod):
    """alpha: None means alpha = rank (scale 1). scaling: "classic" α/r, "rs" α/√r. origin: see the module."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Literal["classic", "rs"] = "classic"
    origin: Literal["zero", "pissa"] = "zero"

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.alpha is not None and self.alpha <= 0:
            yield f"alpha must be above 0, got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "classic" else self.rank**0.5)

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        if self.origin == "zero":
            return {}
        U, S, Vt = singular_triplets(W, self.rank)
        root = (S / self.scale).sqrt()
        A0, B0 = root[:, None] * Vt, U * root
        return {"A0": A0.to(W.dtype), "B0": B0.to(W.dtype)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        A = rng.kaiming_uniform(self.rank, n) if self.origin == "zero" else torch.zeros(self.rank, n)
        return {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(m, self.rank))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        A, B = p["A"], p["B"]
        if self.origin == "pissa":
            A, B = torch.cat([A, p["A0"]]), torch.cat([p["B0"] + B, B], 1)
        return Factors(B, A, None if self.scale == 1 else A.new_full((len(A),), self.scale))

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n)


variant(
    "rslora",
    LoRA,
    {"scaling": "rs"},
    title="rsLoRA",
    paper="Kalajdzievski 2023, arXiv:2312.03732",
    equation="ΔW = (α/√r) B A",
    hypothesis="The change is low-rank, and the right scale of a rank-r product falls as 1/√r, not as 1/r.",
)
variant(
    "pissa",
    LoRA,
    {"origin": "pissa"},
    title="PiSSA",
    paper="Meng et al. 2024, arXiv:2404.02948",
    equation="ΔW = s ((B0+dB)(A0+dA) − B0 A0), s B0 A0 the r largest singular triplets of W",
    hypothesis="The change lies near the principal singular directions of W.",
    rate=1e-3,
)
