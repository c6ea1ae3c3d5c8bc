"""What a few seeds on the same queries allow to be said of rerankers: means with intervals, and verdicts on pairs.

Values are a measure's, from 0 to 1, by arm, seed and query. Seeds and queries both vary, and both count
(`statistics/intervals.py`); a system without seeds (BM25, a bi-encoder) varies by queries alone. A pair is judged on
the differences at the same queries and seeds: its p is the larger of Student's over queries × seeds and that of the
randomisation test over queries, corrected by Holm over all pairs; its interval decides the rest
(`statistics/verdicts.py`), with a margin in the measure's own unit.

A reranker that does not order better than the first stage in the language it was trained in has learned nothing that
another language could be given. Such an arm is called no reranker and gets no verdict.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from itertools import combinations

import numpy as np

from addenda.core.base.errors import AddendaError, nearest
from addenda.ranking.lines import quoted
from addenda.statistics.intervals import Pool, Pooled, of_answers, paired, quantile, spread
from addenda.statistics.randomisation import DRAWS, randomised
from addenda.statistics.verdicts import LEVEL, PairedDifference, Unit, judged, measured, unknown

Values = Mapping[str, Mapping[int | None, Mapping[str, float]]]  # {arm: {seed: {query: value}}}; None: it has no seed
MARGIN = 0.02  # of a measure from 0 to 1: what counts as equal
FEW = 5  # queries that differ, below which a mean is not near to normal
QUERIES = Pooled(0.0, np.inf)  # nothing varies over seeds, and that is known


@dataclass(frozen=True)
class Row:
    """An arm's mean over queries and seeds with its 95 % interval; runs: each seed's own mean, in seed order.

    why: of an arm that is no reranker, else None.
    """

    arm: str
    mean: float
    low: float
    high: float
    runs: tuple[float, ...]
    queries: int
    why: str | None = None


@dataclass(frozen=True)
class Judgement:
    """Arms and pairs by one measure. unit: in which `pairs` are told: pair.words(unit=…)."""

    rows: tuple[Row, ...]
    pairs: tuple[PairedDifference, ...]
    unit: Unit

    def words(self) -> list[str]:
        """Return each pair's verdict as a sentence."""
        return [pair.words(unit=self.unit) for pair in self.pairs]

    def row(self, arm: str) -> Row:
        return next(row for row in self.rows if row.arm == arm)


def judge(
    values: Values,
    *,
    measure: str = "AP",
    margin: float = MARGIN,
    pairs: Iterable[tuple[str, str]] | None = None,
    first: str | None = None,
    english: Values | None = None,
    draws: int = DRAWS,
) -> Judgement:
    """Return what may be said of each arm and pair.

    margin: what counts as equal, of the measure. pairs: (a, b) of arms; None: all. english: the arms' values in
    English, with those of the first stage, whose name is `first`: an arm with seeds that is not above it there gets no
    verdict.
    draws: of the randomisation test.
    Raises AddendaError for arms that were not measured on the same queries, values that are no numbers from 0 to 1, and
    names that there are not.
    """
    if not 0 < margin < 1:
        raise AddendaError(f"margin is what counts as equal, between 0 and 1 of {measure}, got {margin!r}.")
    arms = _arrays(values, "the values")
    chosen = list(combinations(arms, 2)) if pairs is None else list(pairs)
    if bad := [name for pair in chosen for name in pair if name not in arms]:
        raise AddendaError(f"There is no arm {bad[0]!r}.{nearest(bad[0], arms)} Measured: {', '.join(arms)}.")
    unit = Unit(measure, 1.0, 3, "queries")
    why = _no_rerankers(arms, english, first, unit) if english is not None else {}
    pool = _pool(arms)
    rows = tuple(changed(_row(arm, x, pool), why=why.get(arm)) for arm, x in arms.items())
    found = []
    for a, b in chosen:
        if of := next((arm for arm in (a, b) if arm in why), None):
            found.append(unknown(a, b, margin, f"{of} {why[of]}", "void"))
            continue
        x = paired(arms[a], arms[b])
        if x is None:
            found.append(unknown(a, b, margin, "no seed that both have finished"))
            continue
        reach = 1.0 if np.count_nonzero(x.mean(0)) < FEW else 0.0
        item = measured(a, b, x, _pooled(pool, arms, a, b, x), margin, False, reach)
        p = max(item.pair.p, randomised(x.mean(0), draws=draws))
        found.append(changed(item, pair=changed(item.pair, p=p)))
    return Judgement(rows, judged(found, False, unit), unit)


def _no_rerankers(arms: Mapping[str, dict], english: Values, first: str | None, unit: Unit) -> dict[str, str]:
    """Return why, for each arm with seeds whose 95 % interval in English is not above the first stage."""
    there = _arrays(english, "the values in English")
    wanted = [arm for arm in arms if None not in arms[arm]]
    if missing := [str(name) for name in (first, *wanted) if name not in there]:
        raise AddendaError(
            f"The values in English lack {', '.join(missing)}; whether an arm is a reranker is seen by it and by the "
            "first stage (first=), both on the same English queries."
        )
    pool, why = _pool(there), {}
    for arm in wanted:
        x = paired(there[arm], there[str(first)])
        if x is None:
            raise AddendaError(
                f"In English {arm} and {first} have no seed in common. Measure both with the same seeds."
            )
        pooled = _pooled(pool, there, arm, str(first), x)
        mean, low, high = _interval(x, pooled if pooled.freedom else QUERIES)
        if low <= 0:
            told = f"{unit.told(mean)} {unit.name}, {unit.told(low)} to {unit.told(high)}"
            why[arm] = f"is no reranker: in English it is not above {first} (difference {told})"
    return why


def _arrays(values: Values, what: str) -> dict[str, dict[int | None, np.ndarray]]:
    """Return {arm: {seed: values (queries,)}}, queries in one order. Raises AddendaError, see `judge`."""
    every = [(arm, seed, of) for arm, seeds in values.items() for seed, of in seeds.items()]
    if not every or not every[0][2]:
        raise AddendaError(f"There is nothing to judge: {what} hold no arm with a query.")
    queries = list(every[0][2])
    arms: dict[str, dict[int | None, np.ndarray]] = {}
    for arm, seed, of in every:
        name = arm if seed is None else f"{arm}, seed {seed},"
        if missing := set(queries) ^ set(of):
            raise AddendaError(
                f"{name} was not measured on the same queries as {every[0][0]}: {quoted(min(missing))} and "
                f"{len(missing) - 1} others are in one of {what} only. Measure all arms on the same split."
            )
        x = np.array([float(of[q]) for q in queries])
        if not np.all((x >= 0) & (x <= 1)):
            bad = queries[int(np.flatnonzero(~((x >= 0) & (x <= 1)))[0])]
            raise AddendaError(f"{name} has the value {of[bad]} for query {quoted(bad)}; a measure lies from 0 to 1.")
        arms.setdefault(arm, {})[seed] = x
    if mixed := [arm for arm, of in arms.items() if None in of and len(of) > 1]:
        raise AddendaError(f"{mixed[0]} has values with a seed and others without. Give either.")
    return arms


def _pool(arms: Mapping[str, dict[int | None, np.ndarray]]) -> Pool:
    means = {arm: {s: float(x.mean()) for s, x in of.items() if s is not None} for arm, of in arms.items()}
    return Pool.of({arm: of for arm, of in means.items() if of})


def _pooled(pool: Pool, arms: Mapping[str, dict], a: str, b: str, x: np.ndarray) -> Pooled:
    """Return the variance over seeds of a pair: of the one that has seeds, where the other has none."""
    seeded = [arm for arm in (a, b) if None not in arms[arm]]
    if not seeded:
        return QUERIES
    return pool.of_pair(a, b, x.mean(1)) if len(seeded) == 2 else pool.of_arm(seeded[0], x.mean(1))


def _row(arm: str, of: Mapping[int | None, np.ndarray], pool: Pool) -> Row:
    x = np.stack([of[s] for s in sorted(of, key=lambda s: -1 if s is None else s)])
    mean, low, high = _interval(x, QUERIES if None in of else pool.of_arm(arm, x.mean(1)))
    return Row(arm, mean, max(low, 0.0), min(high, 1.0), tuple(float(m) for m in x.mean(1)), x.shape[1])


def _interval(x: np.ndarray, pooled: Pooled) -> tuple[float, float, float]:
    """Return the mean of values or differences, seeds × queries, and its 95 % interval; of one query: −1 to 1."""
    mean = float(x.mean())
    if x.shape[1] < 2:
        return mean, -1.0, 1.0
    error, df = (float(v) for v in spread(*of_answers(x, pooled), x.shape[1], pooled.freedom))
    half = quantile(1 - LEVEL / 2, df) * error
    return mean, mean - half, mean + half
