"""How far the mean of answers, seeds × items, may be from the truth, when seeds and items both vary.

    Var(mean) = lasting + seeds         lasting  what items do in every seed: max(items − shared, 0)
                                        items    variance of the items' means over seeds, by their number
                                        shared   interaction of items and seeds, which `items` and `seeds` both hold
                                        seeds    variance of the seeds' means over items, by their number

Seeds are *paired*: seed 1 gives every arm the same order of the data, so what it does to all arms alike is no part of
a difference between two. The variance of a difference over seeds is therefore twice the mean square of the residual of
arm + seed, pooled over arms, with (arms − 1)(seeds − 1) degrees of freedom. An arm that scatters more than `OWN` ×
what the others do, and beyond chance, is no part of the pool, and its pairs have their own variance, with seeds − 1.
(Compared with a pool that it is part of, an arm could never be 4 × as large where there are fewer than eight.)

Of the sum only `seeds` is uncertain, with few degrees of freedom ν. Satterthwaite gives the sum ν (sum / seeds)², and
takes a variance that came out small by chance at its word: with ν = 2, intervals of 95 % cover 92 %. The power
2 − 2.3 / ν of the same ratio (0 at the least) agrees with him where ν is large, and covers 94.2 to 96.8 % from ν = 2,
whatever the mixture (by integration in the tests, by simulation in `python -m bench coverage`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

OWN = 4.0  # × the variance of the other arms: above it an arm is no part of the pool
CHANCE = 0.001  # and only where chance alone would make it as large this often
POWER = 2.3  # how much lower than Satterthwaite's the power of the uncertain part is, by 1 / its degrees of freedom

Answers = Mapping[int | None, np.ndarray]  # {seed: of each item}; a control has the seed None
Means = Mapping[str, Mapping[int, float]]  # {arm: {seed: mean over items}}


@dataclass(frozen=True)
class Pooled:
    """A variance over seeds, of one run, and its degrees of freedom; 0 of them: nothing is known of seeds."""

    variance: float = 0.0
    freedom: float = 0.0


@dataclass(frozen=True)
class Pool:
    """The arms whose variances over seeds are pooled: `one` is that of a run of an arm, `two` of a difference."""

    arms: frozenset[str]
    one: Pooled
    two: Pooled

    @classmethod
    def of(cls, means: Means) -> "Pool":
        """Pool arms by the means of their seeds, those left out that scatter unlike the others."""
        shared = sorted(set.intersection(*(set(of_arm) for of_arm in means.values()))) if means else []
        if len(shared) > 1:
            alone = uneven(np.array([[of_arm[seed] for seed in shared] for of_arm in means.values()]))
            means = {arm: of_arm for (arm, of_arm), out in zip(means.items(), alone, strict=True) if not out}
        rest = residual(means)
        return cls(frozenset(means), within(means), Pooled(2 * rest.variance, rest.freedom))

    def of_arm(self, arm: str, means: np.ndarray) -> Pooled:
        """Return the variance of a run of an arm. means: of its seeds, for one that is no part of the pool."""
        return self.one if arm in self.arms else _own(means)

    def of_pair(self, a: str, b: str, means: np.ndarray) -> Pooled:
        """Return the variance of a difference of two arms at one seed. means: of the difference, by seed."""
        return self.two if {a, b} <= self.arms else _own(means)


def _own(means: np.ndarray) -> Pooled:
    return Pooled(float(means.var(ddof=1)), len(means) - 1) if len(means) > 1 else Pooled()


def uneven(runs: np.ndarray) -> np.ndarray:
    """Return which arms are no part of the pool. runs: …, arms × seeds, the means over items; → …, arms.

    The variance of an arm is that of its difference from the mean of the others, theirs the residual without it.
    """
    arms, seeds = runs.shape[-2:]
    if arms < 3 or seeds < 2:
        return np.zeros(runs.shape[:-1], dtype=bool)
    found = []
    freedom = (arms - 2) * (seeds - 1)
    most = max(OWN, float(special.fdtri(seeds - 1, freedom, 1 - CHANCE)))
    for arm in range(arms):
        others = np.delete(runs, arm, axis=-2)
        apart = (runs[..., arm, :] - others.mean(-2)).var(-1, ddof=1) * (arms - 1) / arms
        rest = others - others.mean(-1, keepdims=True)
        rest = ((rest - rest.mean(-2, keepdims=True)) ** 2).sum((-1, -2)) / freedom
        found.append(apart > most * rest)
    flags = np.stack(found, -1)
    return flags & (flags.sum(-1, keepdims=True) <= arms - 2)  # a pool has two arms or more


def spread(items, seeds, shared, count, freedom):
    """Return the standard error of a mean and its degrees of freedom. All may be arrays that broadcast.

    items, seeds, shared: see the module; count: of items; freedom: of `seeds`. Where nothing varies: 0 and infinity.
    """
    lasting = np.maximum(items - shared, 0.0)
    variance = lasting + seeds
    sure, known = np.where(variance > 0, variance, 1.0), np.maximum(freedom, 1.0)
    parts = np.where(freedom > 0, (seeds / sure) ** np.maximum(2 - POWER / known, 0.0) / known, 0.0)
    parts = parts + (lasting / sure) ** 2 / np.maximum(count - 1, 1)
    return np.sqrt(variance), np.where(parts > 0, 1 / np.where(parts > 0, parts, 1.0), np.inf)


def of_answers(x: np.ndarray, pooled: Pooled) -> tuple[float, float, float]:
    """Return `items`, `seeds` and `shared` of answers or differences, seeds × items, with the variance over seeds."""
    seeds, items = x.shape
    of_items, shared = float(x.mean(0).var(ddof=1)) / items if items > 1 else 0.0, 0.0
    if seeds > 1 and items > 1:
        rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
        shared = float((rest**2).sum()) / ((items - 1) * (seeds - 1)) / (items * seeds)
    return of_items, pooled.variance / seeds, shared


def paired(left: Answers, right: Answers) -> np.ndarray | None:
    """Return left − right, seeds × items, at the seeds that both have; a control goes with all. None: no such seed."""
    every = {*left, *right}
    seeds = [s for s in left if s in right] if None not in every else [*(every - {None})] or [None]
    rows = [left.get(s, left.get(None)) - right.get(s, right.get(None)) for s in seeds]  # pyright: ignore
    return np.stack(rows) if rows else None


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
    seeds = sorted({s for of_arm in means.values() for s in of_arm})
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
    """Return the variance over the seeds of one arm, pooled over arms that share their seeds."""
    repeated = [np.array(list(of_arm.values())) for of_arm in means.values() if len(of_arm) > 1]
    freedom = sum(len(m) - 1 for m in repeated)
    if not freedom:
        return Pooled()
    variance = sum(float(m.var() * len(m)) for m in repeated) / freedom
    return Pooled(variance, float(shared_freedom(variance, residual(means).variance, len(repeated), freedom)))


def shared_freedom(variance, rest, arms, freedom):
    """Return the degrees of freedom of a variance over seeds that is pooled over arms with the same seeds.

    Such arms do not vary each for itself: with a mean square between seeds B and a residual one R, the variance is
    (B + (arms − 1) R) / arms, a sum of which B is the uncertain part. The power 2 − 1 / 2ν of its share covers 94 to
    96.5 % with two and four arms from three seeds on, in simulation.
    """
    between = np.maximum(arms * variance - (arms - 1) * rest, 0.0)
    n = freedom / arms
    total = between + (arms - 1) * rest
    share = between / np.where(total > 0, total, 1.0)
    parts = share ** (2 - 0.5 / n) / n + (1 - share) ** 2 / (np.maximum(arms - 1, 1) * n)
    return np.clip(1 / np.maximum(parts, 1e-9), n, freedom)


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
    reach: float = 1.0,
) -> int | None:
    """Return the first of `candidates`, numbers of seeds, at which the difference, if it stays, has a verdict; or None.

    parts: items, seeds and shared, as they are with `seeds`; apart, equal: for each candidate the two-sided levels of
    the test against 0 and of the two tests against the margin; reach: by how much an item that never came may differ.
    """
    of_items, of_seeds, shared = parts
    lasting, fewer = max(of_items - shared, 0.0), seeds / candidates
    freedom = pooled.freedom / max(seeds - 1, 1) * (candidates - 1)
    error, df = spread(lasting, of_seeds * fewer, 0.0, count, freedom)
    df, size = np.minimum(df, 1e9), abs(difference)
    differs = size > np.maximum(special.stdtrit(df, 1 - apart / 2) * error, reach * never_seen(count, apart))
    equals = size + np.maximum(special.stdtrit(df, 1 - equal / 2) * error, reach * never_seen(count, equal)) < margin
    decided = np.flatnonzero(differs | equals)
    return int(candidates[decided[0]]) if len(decided) else None
