"""What many low-rank methods share: two thin factors, or offsets from two. They differ in where these start."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.contract import FactorPair, Factors, Params, Shape, WeightMethod, too_high


@dataclass(frozen=True)
class Ranked(WeightMethod):
    """A method with a rank r and a scale s = α/r. alpha: None means alpha = rank (scale 1)."""

    sized_by: ClassVar[str] = "rank"
    helpers: ClassVar[tuple[str, ...]] = ("scale",)
    rank: int = 8
    alpha: float | None = None

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.alpha is not None and self.alpha <= 0:
            yield f"alpha must be above 0, got {self.alpha}"

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class LowRank(Ranked):
    """A method ΔW = s B A with trained B (m × r) and A (r × n), s = α/r. Subclasses say where they start.

    Beside tensors B0 and A0, A and B are offsets from them: ΔW = s ((B0 + B)(A0 + A) − B0 A0), as one product of rank
    2r, s [B0 + B | B] [A ; A0], exactly zero where A and B are.
    """

    dropout: float = 0.0

    def validate(self):
        yield from super().validate()
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {"A": nn.Parameter(torch.zeros(self.rank, n)), "B": nn.Parameter(torch.zeros(m, self.rank))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        A, B = p["A"], p["B"]
        if "A0" in p:
            A, B = torch.cat([A, p["A0"]]), torch.cat([p["B0"] + B, B], 1)
        return Factors(B, A, None if self.scale == 1 else A.new_full((len(A),), self.scale))

    def pair(self, p: Params) -> FactorPair:
        if "A0" in p:
            return FactorPair(p["B0"] + p["B"], p["A0"] + p["A"], self.scale)
        return FactorPair(p["B"], p["A"], self.scale)

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n)
