"""How far the mean of answers, seeds × items, may be from the truth, when seeds and items both vary.

    Var(mean) = items + max(seeds − shared, 0)      items   variance of the items' means over seeds, by their number
                                                    seeds   variance of the seeds' means over items, by their number
                                                    shared  interaction of the two, which both of these hold

Seeds are *paired*: seed 1 gives every arm the same order of the data, so what it does to all arms alike is no part of
a difference between two. The variance of a difference over seeds is therefore twice the mean square of the residual of
arm + seed, pooled over arms, with (arms − 1)(seeds − 1) degrees of freedom. A pair whose own variance is more than
`OWN` × that has its own, with seeds − 1. Student's quantiles with Satterthwaite's degrees of freedom do the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

OWN = 4.0  # × the pooled variance: above it a pair has its own

Means = Mapping[str, Mapping[int | None, float]]  # {arm: {seed: mean over items}}


@dataclass(frozen=True)
class Pooled:
    """A variance over seeds, of one run, and its degrees of freedom; 0 of them: nothing is known of seeds."""

    variance: float = 0.0
    freedom: float = 0.0

    def or_own(self, means: np.ndarray) -> "Pooled":
        """Return this variance, or that of the means of single seeds where it is too large to be of this one."""
        own = float(means.var(ddof=1)) if len(means) > 1 else 0.0
        return Pooled(own, len(means) - 1) if len(means) > 1 and own > OWN * self.variance else self


def spread(items, seeds, shared, count, freedom):
    """Return the standard error of a mean and its degrees of freedom. All may be arrays that broadcast.

    items, seeds, shared: see the module; count: of items; freedom: of `seeds`. Where nothing varies: 0 and infinity.
    """
    variance = items + np.maximum(seeds - shared, 0.0)
    parts = items**2 / np.maximum(count - 1, 1) + np.where(freedom > 0, seeds**2 / np.maximum(freedom, 1e-9), 0.0)
    return np.sqrt(variance), np.where(parts > 0, variance**2 / np.where(parts > 0, parts, 1.0), np.inf)


def of_answers(x: np.ndarray, pooled: Pooled) -> tuple[float, float, float]:
    """Return `items`, `seeds` and `shared` of answers or differences, seeds × items, with the variance over seeds."""
    seeds, items = x.shape
    of_items, shared = float(x.mean(0).var(ddof=1)) / items if items > 1 else 0.0, 0.0
    if seeds > 1 and items > 1:
        rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
        shared = float((rest**2).sum()) / ((items - 1) * (seeds - 1)) / (items * seeds)
    return of_items, pooled.variance / seeds, shared


def quantile(p: float, df: float) -> float:
    """Return a quantile of Student's t; by the special function itself, since a comparison asks for hundreds."""
    return float(special.stdtrit(min(df, 1e9), p))


def two_sided(mean: float, error: float, df: float) -> float:
    """Return the p of Student's test that a mean is 0; where it has no error, 1 at 0 and else 0."""
    if not error:
        return float(mean == 0)
    return float(2 * special.stdtr(min(df, 1e9), -abs(mean) / error))


def residual(means: Means) -> Pooled:
    """Return the mean square of what is left of arm + seed by least squares; cells may be missing."""
    seeds = sorted({s for of_arm in means.values() for s in of_arm}, key=str)
    cells = [(i, seeds.index(s), m) for i, of_arm in enumerate(means.values()) for s, m in of_arm.items()]
    if len(cells) < 2:
        return Pooled()
    design = np.zeros((len(cells), len(means) + len(seeds)))
    for row, (arm, seed, _) in enumerate(cells):
        design[row, arm] = design[row, len(means) + seed] = 1
    y = np.array([m for _, _, m in cells])
    fitted, _, rank, _ = np.linalg.lstsq(design, y)
    freedom = len(cells) - int(rank)
    return Pooled(float(((y - design @ fitted) ** 2).sum()) / freedom, freedom) if freedom else Pooled()


def within(means: Means) -> Pooled:
    """Return the variance over the seeds of one arm, pooled over arms that share their seeds.

    Such arms do not vary each for itself: with a mean square between seeds B and a residual one R, the variance is
    (B + (arms − 1) R) / arms, and Satterthwaite's degrees of freedom lie between seeds − 1 and arms × (seeds − 1).
    """
    repeated = [np.array(list(of_arm.values())) for of_arm in means.values() if len(of_arm) > 1]
    freedom = sum(len(m) - 1 for m in repeated)
    if not freedom:
        return Pooled()
    arms, variance = len(repeated), sum(float(m.var() * len(m)) for m in repeated) / freedom
    rest = residual(means).variance
    between = max(arms * variance - (arms - 1) * rest, 0.0)
    parts = between**2 + (arms - 1) * rest**2
    return Pooled(variance, freedom / arms * ((between + (arms - 1) * rest) ** 2 / parts if parts else arms))


def never_seen(items, level):
    """Return, for a two-sided level, how frequent a kind of item may still be that never came among so many."""
    return 1 - (level / 2) ** (1 / items)


def seeds_needed(
    difference: float,
    margin: float,
    parts: tuple[float, float, float],
    count: int,
    pooled: Pooled,
    seeds: int,
    candidates: np.ndarray,
    apart: np.ndarray,
    equal: np.ndarray,
) -> int | None:
    """Return the first of `candidates`, numbers of seeds, at which the difference, if it stays, has a verdict; or None.

    parts: items, seeds and shared, as they are with `seeds`; apart, equal: for each candidate the two-sided levels of
    the test against 0 and of the two tests against the margin.
    """
    of_items, of_seeds, shared = parts
    lasting, fewer = max(of_items - shared, 0.0), seeds / candidates
    freedom = pooled.freedom / max(seeds - 1, 1) * (candidates - 1)
    error, df = spread(lasting + shared * fewer, of_seeds * fewer, shared * fewer, count, freedom)
    df, size = np.minimum(df, 1e9), abs(difference)
    differs = size > np.maximum(special.stdtrit(df, 1 - apart / 2) * error, never_seen(count, apart))
    equals = size + np.maximum(special.stdtrit(df, 1 - equal / 2) * error, never_seen(count, equal)) < margin
    decided = np.flatnonzero(differs | equals)
    return int(candidates[decided[0]]) if len(decided) else None
