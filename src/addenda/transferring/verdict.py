"""Whether a transfer is as good as what it is compared with: non-inferiority, with seeds as the units.

    found = non_inferior(transferred, reference, margin=0.05)
    found.verdict                       # "non-inferior", "inferior" or "cannot tell"
    print(found)                        # −1.2 points (95 % from below: −3.4), 10 seeds × 998 items: non-inferior …

A seed pairs source, target and data. Accuracies differ from seed to seed by several points, so an interval over items
alone tells of these seeds and of no others: with such an interval an arm that is worse by the margin passes far more
often than in 5 % of cases. Here the lower bound is that of `statistics.intervals`, in which seeds and items both vary:
the one-sided 95 %, which is the lower end of the 90 % interval. `python -m recipes trans-lora --power` simulates it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from addenda.core.base.errors import AddendaError
from addenda.statistics.intervals import Answers, Pooled, paired
from addenda.statistics.verdicts import measured

MARGIN = 0.05
STEADY = 0.03  # between the seeds of an arm trained on real labels: above it a margin of 5 points wants more seeds
SEEDS, ITEMS = 10, 900  # for fewer of them the verdict is that it cannot be told

Known = Mapping[int, Sequence[int]]  # {seed: right or wrong, item by item}


@dataclass(frozen=True)
class NonInferiority:
    """A difference of accuracies, transferred − reference, as shares of 1, and what may be said of it.

    low: the one-sided 95 % bound from below; high: from above; of one seed, which tells nothing of others, −1 and 1.
    wanted: seeds and items, with fewer of which the verdict is "cannot tell"; the numbers are those all the same.
    enough: whether they are there. gaps: by seed.
    """

    difference: float
    low: float
    high: float
    margin: float
    seeds: int
    items: int
    enough: bool
    gaps: Mapping[int, float]
    wanted: tuple[int, int] = (SEEDS, ITEMS)

    @property
    def verdict(self) -> str:
        if not self.enough:
            return "cannot tell"
        return "non-inferior" if self.low > -self.margin else "inferior" if self.high < -self.margin else "cannot tell"

    def __str__(self) -> str:
        why = "" if self.enough else f" ({self.wanted[0]} seeds and {self.wanted[1]:,} items are wanted)"
        return (
            f"{100 * self.difference:+.1f} points (95 % from below: {100 * self.low:+.1f}; from above: "
            f"{100 * self.high:+.1f}), {_many(self.seeds, 'seed')} × {_many(self.items, 'item')}: {self.verdict} "
            f"within {100 * self.margin:g} points{why}"
        )


def non_inferior(
    transferred: Known, reference: Known, *, margin: float = MARGIN, seeds: int = SEEDS, items: int = ITEMS
) -> NonInferiority:
    """Return what may be said of two arms on the same items, of the seeds that both have.

    seeds, items: how many are wanted for a verdict. Raises AddendaError where they share no seed, or items differ.
    """
    if not 0 < margin < 1:
        raise AddendaError(f"margin= is a share between 0 and 1 (0.05: 5 points), got {margin!r}.")
    shared = [s for s in transferred if s in reference]
    counts = {len(known[s]) for known in (transferred, reference) for s in shared}
    if not shared or len(counts) != 1 or not min(counts):
        raise AddendaError(
            f"Arms are compared at seeds that both have, item by item: {len(shared)} seeds are shared, with "
            f"{sorted(counts) or 'no'} items."
        )
    x = paired(*(_answers(known, shared) for known in (transferred, reference)))
    assert x is not None
    means = x.mean(1)
    pooled = Pooled(float(means.var(ddof=1)), len(shared) - 1) if len(shared) > 1 else Pooled()
    found = measured("transferred", "reference", x, pooled, margin, until=False).pair
    wanted = max(seeds, 2), items
    enough = len(shared) >= wanted[0] and x.shape[1] >= items
    gaps = {s: float(m) for s, m in zip(shared, means, strict=True)}
    return NonInferiority(
        found.difference, found.low90, found.high90, margin, len(shared), x.shape[1], enough, gaps, wanted
    )  # fmt: skip


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _answers(known: Known, seeds: Sequence[int]) -> Answers:
    return {s: np.asarray(known[s], dtype=np.float64) for s in seeds}


def better(arms: Mapping[str, Known]) -> str:
    """Return the arm with the highest mean accuracy: a transfer is held against the best of source and target base."""
    return max(arms, key=lambda name: float(np.mean([np.mean(items) for items in arms[name].values()])))


def deviation(known: Known) -> float:
    """Return the standard deviation of an arm's accuracy over its seeds, a share of 1; 0 for one seed."""
    means = [float(np.mean(items)) for items in known.values()]
    return float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
