"""What may be said of a pair of arms: better, worse, equivalent, no gain, undecided or void.

    better, worse   the difference is not 0: Holm's p over all pairs of the report is below 5 %
    equivalent      it is within ± the margin: two one-sided tests, that is the 90 % interval (Schuirmann 1987)
    no gain         it is below + the margin, by the same interval, and may be far below −
    undecided       none of these: `why` says so, `more_seeds` how many more would decide if the difference stayed
    void            one of the two has no result to be judged by: `why` says so

They are tried in this order, so a difference that is there but small reads better, with its size. Where a comparison
is looked at until it decides, every level is that of the look (`spending`), of the intervals too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from addenda.statistics import spending
from addenda.statistics.intervals import Pooled, never_seen, of_answers, quantile, seeds_needed, spread, two_sided

LEVEL = 0.05
K = TypeVar("K")
FORECAST = 1000  # seeds, and no more, that are asked whether they would decide


@dataclass(frozen=True)
class Unit:
    """In what a difference is told. scale: of a share of 1; digits: behind the point; items: what there are many of."""

    name: str = "points"
    scale: float = 100.0
    digits: int = 1
    items: str = "items"

    def told(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}"


POINTS = Unit()


@dataclass(frozen=True)
class PairedDifference:
    """Arm `a` minus arm `b` on the same items and seeds, as shares of 1, and what may be said of it.

    low, high: 95 % interval; low90, high90: 90 %; error: standard error, with `df` degrees of freedom; p: of the
    difference being 0, over all looks; margin: what counts as equal. why, more_seeds: of what is neither different nor
    equivalent; more_seeds is None where no number of seeds would decide. seeds_help: whether a look that is still to
    come may decide it, where the comparison is looked at until it decides.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    items: int
    seeds: int
    error: float
    df: float
    low90: float
    high90: float
    margin: float
    verdict: str = "undecided"
    why: str | None = None
    more_seeds: int | None = None
    seeds_help: bool = True

    @property
    def better(self) -> str | None:
        """The better arm, or None if there is no such verdict."""
        return {"better": self.a, "worse": self.b}.get(self.verdict)

    def turned(self) -> "PairedDifference":
        """Return `b` minus `a`."""
        turned = replace(
            self, a=self.b, b=self.a, difference=-self.difference, low=-self.high, high=-self.low,
            low90=-self.high90, high90=-self.low90,
        )  # fmt: skip
        return replace(turned, verdict=turned._judged())

    def _judged(self) -> str:
        if self.verdict == "void":
            return "void"
        if self.p_holm < LEVEL and (self.low > 0 or self.high < 0):
            return "better" if self.low > 0 else "worse"
        if self.high90 < self.margin:
            return "equivalent" if self.low90 > -self.margin else "no gain"
        return "undecided"

    def words(self, titles: Mapping[str, str] | None = None, unit: Unit = POINTS) -> str:
        """Return the verdict as a sentence, in percentage points or another unit."""
        a, b = ((titles or {}).get(k, k) for k in (self.a, self.b))
        name, told, margin = unit.name, unit.told, f"{self.margin * unit.scale:g} {unit.name}"
        low, high, gap = told(self.low), told(self.high), told(self.difference)
        at_90 = f"difference {gap}, 90 %: {told(self.low90)} to {told(self.high90)}"
        match self.verdict:
            case "better":
                return f"{a} better than {b} by {gap} {name} ({low} to {high})"
            case "worse":
                return (
                    f"{b} better than {a} by {told(-self.difference)} {name} ({told(-self.high)} to {told(-self.low)})"
                )
            case "equivalent":
                return f"{a} and {b} equivalent within ±{margin} ({at_90})"
            case "no gain":
                return f"{a} gains no more than {margin} over {b} ({at_90})"
            case "void":
                return f"{a} and {b} cannot be compared: {self.why}"
        gap = f"{gap} {name}" + (f", {low} to {high}" if self.low > -1 or self.high < 1 else "")
        return f"{a} and {b} undecided (difference {gap}; {self.why})"


@dataclass(frozen=True)
class Measured:
    """A difference before it is judged: its parts of variance, and what they were pooled from."""

    pair: PairedDifference
    parts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pooled: Pooled = Pooled()  # noqa: RUF009 – frozen
    reach: float = 1.0


def unknown(
    a: str, b: str, margin: float, why: str | None, verdict: str = "undecided", more: int | None = None
) -> Measured:
    """Return a pair of which nothing is known."""
    return Measured(
        PairedDifference(a, b, 0.0, -1.0, 1.0, 1.0, 1.0, 0, 0, np.inf, 1.0, -1.0, 1.0, margin, verdict, why, more)
    )


def measured(a: str, b: str, x: np.ndarray, pooled: Pooled, margin: float, until: bool, reach: float = 1.0) -> Measured:
    """Return the difference x, seeds × items, with its intervals and p. until: it is one look of several.

    reach: by how much an item of a kind that never came may differ, with answers that are right or wrong by 1.
    """
    seeds, items = x.shape
    mean = float(x.mean())
    blank = unknown(a, b, margin, None).pair
    blank = replace(blank, difference=mean, items=items, seeds=seeds)
    if items < 2:
        return Measured(replace(blank, why="one item does not tell what another would give", seeds_help=False))
    if not pooled.freedom:
        why = "one seed does not tell what another would give: three or more are needed"
        return Measured(replace(blank, why=why, more_seeds=spending.LOOKS[0] - seeds))
    parts = of_answers(x, pooled)
    error, df = (float(v) for v in spread(*parts, items, pooled.freedom))
    p = two_sided(mean, error, df)

    def interval(alpha: float) -> tuple[float, float]:
        at = spending.level(seeds, alpha) if until else alpha
        half = max(quantile(1 - at / 2, df) * error, reach * never_seen(items, at))
        return max(mean - half, -1.0), min(mean + half, 1.0)

    (low, high), (low90, high90) = interval(LEVEL), interval(2 * LEVEL)
    p = float(spending.overall(seeds, p)) if until else p
    pair = replace(blank, low=low, high=high, low90=low90, high90=high90, p=p, error=error, df=df)
    return Measured(pair, parts, pooled, reach)


def holm(p: Mapping[K, float], tests: int | None = None) -> dict[K, float]:
    """Return the p of each test corrected for all of them (Holm 1979). tests: how many there are; None: those given."""
    family, highest, found = tests or len(p), 0.0, {}
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = found[name] = max(highest, min(1.0, p[name] * (family - rank)))
    return found


def judged(found: Sequence[Measured], until: bool, unit: Unit = POINTS) -> tuple[PairedDifference, ...]:
    """Return the pairs with Holm's p over all that are not void, a verdict, and what would decide."""
    pairs = [m.pair for m in found]
    corrected = holm({i: pair.p for i, pair in enumerate(pairs) if pair.verdict != "void"})
    for i, p in corrected.items():
        pair = replace(pairs[i], p_holm=p)
        pair = replace(pair, verdict=pair._judged())
        if pair.verdict in ("undecided", "no gain") and pair.why is None:
            helped = not until or _seeds_help(pair, found[i])
            pair = replace(_forecast(pair, found[i], len(corrected), until, unit), seeds_help=helped)
        pairs[i] = pair
    return tuple(pairs)


def _seeds_help(pair: PairedDifference, m: Measured) -> bool:
    """Return whether one of the looks left would decide a pair, wherever in 95 % of cases its seeds moved it.

    The level is the least strict that Holm may ask, so that little is given up that a look could still tell.
    """
    looks = np.array([look for look in spending.LOOKS if look > pair.seeds], dtype=np.int64)
    if not len(looks):
        return False
    apart, equal = (np.array([spending.level(n, alpha) for n in looks.tolist()]) for alpha in (LEVEL, 2 * LEVEL))
    moves = (m.parts[1] * (1 - pair.seeds / spending.LOOKS[-1])) ** 0.5  # of the mean, by the seeds to come
    moves *= quantile(0.975, m.pooled.freedom)
    ends = (pair.difference, pair.difference - moves, pair.difference + moves)
    known = pair.margin, m.parts, pair.items, m.pooled, pair.seeds, looks, apart, equal
    return any(seeds_needed(end, *known, reach=m.reach) is not None for end in ends)


def _forecast(pair: PairedDifference, m: Measured, tests: int, until: bool, unit: Unit) -> PairedDifference:
    """Return an undecided pair with the seeds that would decide it at the strictest level that Holm may ask."""
    alphas = LEVEL / tests, 2 * LEVEL
    last = spending.LOOKS[-1]
    looks = np.array([look for look in spending.LOOKS if until and look > pair.seeds], dtype=np.int64)
    candidates = np.append(looks, np.arange(max(pair.seeds, last * until) + 1, FORECAST))
    levels = (
        np.array([spending.level(min(n, last), alpha) if until else alpha for n in candidates.tolist()])
        for alpha in alphas
    )
    needed = seeds_needed(
        pair.difference, pair.margin, m.parts, pair.items, m.pooled, pair.seeds, candidates, *levels, reach=m.reach
    )
    if needed is None:
        alone = quantile(1 - alphas[1] / 2, pair.items - 1) * max(m.parts[0] - m.parts[2], 0.0) ** 0.5
        alone = max(alone, m.reach * never_seen(pair.items, alphas[1]))
        if alone < pair.margin / 2:  # the items would do, and the difference is about the margin, or 0 beyond it
            return replace(pair, why="on the margin: no number of seeds that can be run would decide if this stays")
        left = f"{pair.items:,} {unit.items} alone leave ±{unit.told(alone)} {unit.name}"
        why = f"the {left}, so more of them are needed, not seeds"
        return replace(pair, why=why)
    more = needed - pair.seeds
    return replace(pair, more_seeds=more, why=f"{more} more seed{'s' * (more != 1)} would decide if this stays")
