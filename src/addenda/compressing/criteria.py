"""Which rank a layer gets, from its singular values: by energy, absolute or relative size, a budget, or a given list.

| rule         | keeps                                                                        |
| ------------ | ---------------------------------------------------------------------------- |
| `energy=e`   | the fewest singular values with Σ_{j ≤ r} s_j² ≥ e Σ s_j²; e = 1 keeps all     |
| `value=t`    | s_j ≥ t                                                                      |
| `relative=t` | s_j ≥ t s_1                                                                  |
| `keep=k`     | the ranks that cost at most k of the layers and lose the least energy over all |
| `ranks={…}`  | what it says, path by path; None leaves a layer dense                        |

The first three look at one layer at a time, and keep one singular value at least. Where a norm follows a layer the
scale of its weights is arbitrary, so a threshold of `value` is good for one way of training only. `keep` sums shares of
each layer's energy, and gives no layer less than half of the rank at which it would keep k of its own cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.ranges import Range
from addenda.reducing.ranks import Layer, Ranks, waterfill

RULES = {
    "energy": Range(0, 1, above=True),
    "value": Range(0, 1e30, above=True),
    "relative": Range(0, 1, above=True),
    "keep": Range(0, 1, above=True, below=True),
}
MEANINGS = {
    "energy": "the share of a layer's energy to keep",
    "value": "the least singular value to keep",
    "relative": "the least singular value to keep, as a share of the largest",
    "keep": "a share of the layers' cost",
}


@dataclass(frozen=True)
class Rule:
    """A rule for the rank of a layer: one of those above."""

    energy: float | None = None
    value: float | None = None
    relative: float | None = None
    keep: float | None = None
    ranks: Mapping[str, int | None] | None = None

    def __post_init__(self):
        options = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(options) != 1:
            raise AddendaError(
                f"Expected exactly one of energy, value, relative, keep and ranks; got {', '.join(options) or 'none'}."
            )
        ((name, threshold),) = options.items()
        if name in RULES and (problem := RULES[name].refusal(name, threshold)):
            raise AddendaError(f"{problem}. It is {MEANINGS[name]}.")
        if name == "ranks" and not isinstance(threshold, Mapping):
            kind = type(threshold).__name__
            raise AddendaError(f"ranks is a rank by path, {{path: rank}}, None for dense; got a {kind}.")

    @property
    def alone(self) -> bool:
        """Whether a layer's rank depends on nothing but its own singular values."""
        return self.keep is None and self.ranks is None

    def rank(self, S: Tensor) -> int:
        """Return the rank of one layer with this spectrum (k, falling), 1 … k."""
        if self.energy is not None:
            losses = tails(S)  # energy lost at rank 0 … k
            if self.energy == 1:
                return len(S)
            enough = losses <= (1 - self.energy) * losses[0]
            return max(int(enough.nonzero()[0]), 1)
        least = self.value if self.value is not None else self.relative * S[0]  # type: ignore[operator]
        return max(int((least <= S).sum()), 1)

    def over(self, layers: Sequence["Spectrum"]) -> Ranks:
        """Return the ranks of all layers; None: dense. Raises AddendaError for a budget that cannot be met."""
        if self.keep is not None:
            return waterfill(layers, self.keep)
        if self.ranks is None:
            return {x.path: self.rank(torch.as_tensor(x.singular)) for x in layers}
        full_ranks = {x.path: x.full for x in layers}
        problems = [f"{p}: not a layer that can be factorised" for p in self.ranks if p not in full_ranks]
        problems += [
            problem for p, r in self.ranks.items() if p in full_ranks and r is not None
            and (problem := Range(1, full_ranks[p], whole=True).refusal(f"the rank of {p}", r))
        ]  # fmt: skip
        if problems:
            raise AddendaError(f"ranks does not fit the model: {'; '.join(problems[:8])}.")
        return {p: self.ranks.get(p) for p in full_ranks}

    def __str__(self) -> str:
        name = next(f.name for f in fields(self) if getattr(self, f.name) is not None)
        return "given ranks" if name == "ranks" else f"{name} = {getattr(self, name):g}"


@dataclass(frozen=True)
class Spectrum(Layer):
    """A layer as the budget sees it. whole: its cost as it is; each: that of one rank; singular (k): s_1 ≥ s_2 ≥ …"""

    whole: float = 0.0
    each: float = 1.0
    singular: Sequence[float] = ()

    @classmethod
    def of(cls, path: str, S: Tensor, whole: int, each: int) -> "Spectrum":
        losses = tails(S)
        errors = (losses / losses[0].clamp_min(1e-300)).tolist()
        return cls(path, len(S), len(S), errors, whole=whole, each=each, singular=S.tolist())

    @property
    def full(self) -> int:
        return len(self.singular)

    @property
    def dense(self) -> float:
        return self.whole

    @property
    def break_even(self) -> int:
        return highest_saving(self.whole, self.each, self.full)

    def highest(self, keep: float) -> int:
        return int(keep * self.whole / self.each + 1e-9)

    def cost(self, rank: int | None) -> float:
        return self.whole if rank is None else rank * self.each


def tails(S: Tensor) -> Tensor:
    """Return the energy left out at every rank r = 0 … k: (k + 1) Σ_{j > r} s_j², the smallest added first."""
    squares = S.double().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def highest_saving(whole: float, each: float, full: int) -> int:
    """Return the highest rank that costs less than the layer as it is; 0 where none does."""
    return min(full, -int(-whole // each) - 1) if whole > 0 else 0
