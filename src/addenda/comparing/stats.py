"""What a comparison of a few seeds on a few hundred shared items allows one to say, and no more.

An arm is a 0/1 array of seeds × items. Two things vary, and both count:

    Var(mean) = v/n  +  max(s²/S − r/(n·S), 0)      v  variance of the items' means over seeds (n items)
                                                    s² variance of the seeds' means over items (S seeds)
                                                    r  interaction of the two, which v/n already holds

Two or three seeds estimate s² badly: with two, a plain bootstrap over seeds sees half of it, and a test over the
items alone calls equal methods different in 15-50 % of cases. So s² is *pooled over all arms* (the larger of the
arm's own and the pooled one is used), t quantiles with Satterthwaite's degrees of freedom replace 1.96, and an
interval is *the wider, side by side,* of this one and of the two-level bootstrap (seeds outer, items inner; one
draw of items serves every seed and arm, because they answered the same items). In simulations with equal methods
this holds its 5 % with 2 arms × 2 seeds and up; arms whose seeds scatter very unequally can double it. With one
seed nothing is known about seeds: the statements are then about these runs, and `Comparison.caveats` says so.

A pair of arms is compared on the paired differences (same items, same seeds). Its p is the larger of two:
- exact sign-flip over items: under "the two runs are interchangeable on each item" the sum over items of
  ±|difference summed over seeds| has a distribution that is convolved exactly, no sampling. One seed: McNemar's
  exact test. It needs no normality but takes the seeds as given;
- Satterthwaite's t on the mean difference, with the seed variance above.
Holm corrects over all pairs of arms and the better base control. A pair is decided if Holm's p is below 5 % and
the interval excludes zero. Everything is deterministic: the bootstrap's generator has a fixed seed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy import special, stats

from addenda.comparing.entries import TrialRecord
from addenda.comparing.record import FULL, HEAD, Record
from addenda.core.base.errors import AddendaError

LEVEL = 0.05
DRAWS = 2000
SEED = 20240601


@dataclass(frozen=True)
class Estimate:
    """Mean accuracy of an arm in 0..1 with its 95 % interval; `runs` are the seeds' own means, in seed order."""

    mean: float
    low: float
    high: float
    runs: tuple[float, ...]
    items: int


@dataclass(frozen=True)
class PairedDifference:
    """Arm `a` minus arm `b`: paired difference, 95 % interval, p, Holm's p, and what could have been seen.

    `detectable` is roughly the smallest difference that this many items and seeds show in 8 of 10 comparisons at
    the strictest level that Holm may ask; `math.inf` if none short of everything would do.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    detectable: float
    items: int
    seeds: int

    @property
    def better(self) -> str | None:
        """The better arm, or None if the two cannot be told apart."""
        if self.p_holm < LEVEL and (self.low > 0 or self.high < 0):
            return self.a if self.difference > 0 else self.b
        return None

    def words(self, titles: Mapping[str, str] | None = None) -> str:
        """Return the verdict as a sentence, in percentage points."""
        a, b = ((titles or {}).get(k, k) for k in (self.a, self.b))
        gap = f"{abs(self.difference) * 100:.1f} points"
        if self.better == self.a:
            return f"{a} better than {b} by {gap} ({self.low * 100:.1f} to {self.high * 100:.1f})"
        if self.better == self.b:
            return f"{b} better than {a} by {gap} ({-self.high * 100:.1f} to {-self.low * 100:.1f})"
        seeds = f"{self.items} items and {self.seeds} seed{'s' * (self.seeds != 1)}"
        limit = (
            f"{seeds} show a difference of about {self.detectable * 100:.0f} points or more, not a smaller one"
            if math.isfinite(self.detectable)
            else f"{seeds} are too few to show any difference at all"
        )
        return f"{a} and {b} cannot be told apart (difference {gap}; {limit})"


@dataclass(frozen=True)
class Comparison:
    """The statistics of one record. `test` and `ood` are keyed by arm; letters and pairs leave the lesser control out.

    Two arms that share a letter cannot be told apart. `leaders` are the fitted methods that no other fitted method
    beats, those with a diverged run left out; `control` is the best control that is not fully fine-tuned, over which
    gains count: of the bare base, or a new head alone;
    `diverged` maps an arm to its failed seeds.
    """

    test: dict[str, Estimate]
    ood: dict[str, Estimate]
    pairs: tuple[PairedDifference, ...]
    letters: dict[str, str]
    leaders: tuple[str, ...]
    control: str | None
    diverged: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()

    def pair(self, a: str, b: str) -> PairedDifference | None:
        """Return the pair in whichever order it was compared, or None if it was not."""
        return next((p for p in self.pairs if {p.a, p.b} == {a, b}), None)

    def beats(self, a: str, b: str) -> bool:
        """Return whether `a` is better than `b` beyond doubt. Methods left unordered cannot be told apart."""
        pair = self.pair(a, b)
        return pair is not None and pair.better == a


def analyse(record: Record, draws: int = DRAWS) -> Comparison:
    """Compute all statistics of a record. Raises AddendaError if no run of it has test items."""
    runs = {
        arm: record.trials_of(arm, stage)
        for stage in ("final", "control")
        for arm in dict.fromkeys([*record.config.methods, *(t.method for t in record.trials)])
        if record.trials_of(arm, stage)
    }
    diverged = {
        arm: tuple(t.seed for t in ts if t.status != "ok")
        for arm, ts in runs.items()
        if any(t.status != "ok" for t in ts)
    }
    test = _arms(runs, "test")
    if test:  # so that a very large split is drawn from less often
        draws = max(200, min(draws, 200_000_000 // max(x.size for seeds in test.values() for x in seeds.values())))
    if not test:
        raise AddendaError(
            f"The record {record.path} has no finished run with test items yet, so there is nothing to compare. "
            "Repeat the `addenda compare` command with this --out: it goes on where it stopped."
        )
    fitted = [a for a in test if runs[a][0].stage == "final"]
    controls = [a for a in test if a not in fitted or a == HEAD]
    control = max(controls, key=lambda a: np.mean([x.mean() for x in test[a].values()])) if controls else None
    pooled, freedom = _pooled([test[a] for a in fitted if a not in diverged])
    estimates = _estimates(test, pooled, freedom, draws)
    arms = [*fitted, control] if control and control not in fitted else fitted
    ranked = sorted(arms, key=lambda a: -estimates[a].mean)
    pairs = _holm([_pair(a, b, test[a], test[b], pooled, freedom, draws) for a, b in combinations(ranked, 2)])
    ood = _arms(runs, "ood")
    ood_pool = _pooled([ood[a] for a in fitted if a in ood and a not in diverged])
    methods = [a for a in ranked if a in fitted and a not in (FULL, HEAD)]
    beaten = {p.b if p.better == p.a else p.a for p in pairs if p.better and {p.a, p.b} <= set(methods)}
    caveats = []
    if fitted and freedom == 0:
        caveats.append("No arm has two seeds: these statements are about these runs, not about the methods.")
    for arm, seeds in diverged.items():
        caveats.append(
            f"{arm}: {len(seeds)} of {len(runs[arm])} runs diverged; such a run counts with its measured answers, "
            "or as all wrong where none could be measured."
        )
    return Comparison(
        estimates,
        _estimates(ood, *ood_pool, draws),
        pairs,
        letters(ranked, [(p.a, p.b) for p in pairs if p.better]),
        tuple(a for a in methods if a not in beaten and a not in diverged),
        control,
        diverged,
        tuple(caveats),
    )


def sign_flip(differences: Iterable[int]) -> float:
    """Return the exact two-sided p of Σd under independent fair signs of integers d. With d in −1, 0, 1: McNemar's."""
    d = np.asarray(list(differences), dtype=np.int64)
    sizes, counts = np.unique(np.abs(d[d != 0]), return_counts=True)
    law = np.ones(1)  # of (Σ ±|d| + Σ|d|) / 2, the total of the positive ones
    for size, count in zip(sizes, counts, strict=True):
        binomial = np.zeros(size * count + 1)
        binomial[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        law = np.convolve(law, binomial)
    total = int(np.abs(d).sum())
    extreme = np.abs(2 * np.arange(total + 1) - total) >= abs(int(d.sum()))
    return float(min(1.0, law[extreme].sum()))


def letters(ranked: Sequence[str], different: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a compact letter display (Piepho 2004, insert and absorb): arms share a letter iff not told apart."""
    columns = {frozenset(ranked)}
    for pair in map(frozenset, different):
        columns = {c - {x} for c in columns for x in pair if pair <= c} | {c for c in columns if not pair <= c}
        columns = {c for c in columns if not any(c < other for other in columns)}
    ordered = sorted(columns, key=lambda c: sorted(ranked.index(a) for a in c))
    names = [chr(97 + i) if i < 26 else f"z{i - 25}" for i in range(len(ordered))]
    return {a: "".join(n for n, c in zip(names, ordered, strict=True) if a in c) for a in ranked}


def _arms(runs: Mapping[str, list[TrialRecord]], split: str) -> dict[str, dict[int | None, np.ndarray]]:
    """Return {arm: {seed: 0/1 per item}}. A diverged run without answers is all wrong; an arm without any is absent."""
    lengths = [len(result.items) for ts in runs.values() for t in ts if (result := t.on(split))]
    arms: dict[str, dict[int | None, np.ndarray]] = {}
    for arm, trials in runs.items():
        for t in trials:
            if result := t.on(split):
                row = np.frombuffer(result.items.encode(), dtype=np.uint8) - np.uint8(48)
            elif t.status != "ok" and lengths:
                row = np.zeros(lengths[0], dtype=np.uint8)
            else:
                continue
            arms.setdefault(arm, {})[t.seed] = row.astype(np.float64)
    return arms


def _pooled(arms: Sequence[Mapping[int | None, np.ndarray]]) -> tuple[float, int]:
    """Return the variance of seeds' means, pooled over arms, and its degrees of freedom (0: no arm has two seeds)."""
    means = [np.array([x.mean() for x in arm.values()]) for arm in arms if len(arm) > 1]
    freedom = sum(len(m) - 1 for m in means)
    return (sum(float(m.var() * len(m)) for m in means) / freedom if freedom else 0.0), freedom


def _spread(x: np.ndarray, pooled: float, freedom: int) -> tuple[float, float]:
    """Return the standard error of the mean of x (seeds × items) and its degrees of freedom (module docstring)."""
    seeds, items = x.shape
    a = float(x.mean(0).var(ddof=1)) / items if items > 1 else 0.0
    of_arm, overlap = 0.0, 0.0
    if seeds > 1:
        of_arm = float(x.mean(1).var(ddof=1))
        rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
        overlap = float((rest**2).sum()) / max((items - 1) * (seeds - 1), 1) / (items * seeds)
    b, freedom = max(of_arm, pooled) / seeds, freedom or seeds - 1
    variance = a + max(b - overlap, 0.0)
    parts = (a * a / (items - 1) if items > 1 else 0.0) + (b * b / freedom if freedom else 0.0)
    return math.sqrt(variance), (variance**2 / parts if parts else math.inf)


@lru_cache(maxsize=4)
def _draws(size: int, draws: int, salt: int) -> np.ndarray:
    """Return bootstrap weights, draws × size, each row summing to 1. Cached: all share one draw of items."""
    drawn = np.random.default_rng([SEED, salt]).integers(size, size=(draws, size))
    rows = np.arange(draws)[:, None] * size
    return np.bincount((drawn + rows).ravel(), minlength=draws * size).reshape(draws, size).astype(np.float32) / size


def _quantile(p: float, df: float) -> float:
    """Return a quantile of Student's t; by the special function itself, since a comparison asks for hundreds."""
    return float(special.stdtrit(min(df, 1e9), p))


def _interval(x: np.ndarray, pooled: float, freedom: int, draws: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of x (seeds × items): the wider, by side, of t and two-level bootstrap."""
    seeds, items = x.shape
    means = x @ _draws(items, draws, 1).T  # seeds × draws
    boot = (means * _draws(seeds, draws, 2).T).sum(0)
    low, high = np.quantile(boot, [LEVEL / 2, 1 - LEVEL / 2])
    error, df = _spread(x, pooled, freedom)
    half, mean = _quantile(1 - LEVEL / 2, df) * error, float(x.mean())
    return min(float(low), mean - half), max(float(high), mean + half)


def _estimates(arms: Mapping, pooled: float, freedom: int, draws: int) -> dict[str, Estimate]:
    estimates = {}
    for arm, runs in arms.items():
        x, control = np.stack(list(runs.values())), None in runs  # a control has no seed, hence no seed variance
        low, high = _interval(x, 0.0 if control else pooled, 0 if control else freedom, draws)
        items, right = x.shape[1], round(x.mean() * x.shape[1])
        if min(right, items - right) < 5:  # no normal approximation, nor bootstrap, near 0 or all
            exact = stats.binomtest(right, items).proportion_ci(1 - LEVEL, "exact")
            low, high = min(low, exact.low), max(high, exact.high)
        runs_ = tuple(float(m) for m in x.mean(1))
        estimates[arm] = Estimate(float(x.mean()), max(low, 0.0), min(high, 1.0), runs_, items)
    return estimates


def _pair(
    a: str, b: str, left: Mapping, right: Mapping, pooled: float, freedom: int, draws: int
) -> tuple[PairedDifference, float, float]:
    """Return a difference without Holm's part, its standard error and degrees of freedom. A control has all seeds."""
    seeds = [s for s in left if s in right] if None not in {*left, *right} else [*{*left, *right} - {None}] or [None]
    if not seeds:  # an interrupted comparison: no seed that both have finished
        return PairedDifference(a, b, 0.0, -1.0, 1.0, 1.0, 1.0, math.inf, 0, 0), math.inf, 1.0
    x = np.stack([left.get(s, left.get(None)) - right.get(s, right.get(None)) for s in seeds])
    items, mean = x.shape[1], float(x.mean())
    fitted = (None not in left) + (None not in right)
    variance, freedom = fitted * pooled, freedom if fitted else 0
    error, df = _spread(x, variance, freedom)
    low, high = _interval(x, variance, freedom, draws)
    unseen = 1 - (LEVEL / 2) ** (1 / items)  # a kind of item that never came may still be this frequent
    low, high = max(min(low, mean - unseen), -1.0), min(max(high, mean + unseen), 1.0)
    p = sign_flip(x.sum(0).round().astype(int))
    if error:
        p = max(p, float(2 * special.stdtr(min(df, 1e9), -abs(mean) / error)))
    return PairedDifference(a, b, mean, low, high, p, p, math.inf, items, len(seeds)), error, df


def _holm(compared: list[tuple[PairedDifference, float, float]]) -> tuple[PairedDifference, ...]:
    """Return pairs with Holm's p, and the difference that each could have shown at the strictest level of Holm."""
    highest, pairs, level = 0.0, [pair for pair, _, _ in compared], LEVEL / max(len(compared), 1)
    for rank, i in enumerate(sorted(range(len(compared)), key=lambda i: compared[i][0].p)):
        pair, error, df = compared[i]
        highest = max(highest, min(1.0, pair.p * (len(compared) - rank)))
        seen = math.inf
        if pair.items:
            least = math.ceil(math.log2(2 / level)) / pair.items  # fewer items that differ cannot make p small enough
            seen = max(least, error * (_quantile(1 - level / 2, df) + _quantile(0.8, df)))
        pairs[i] = replace(pair, p_holm=highest, detectable=seen if seen < 1 else math.inf)
    return tuple(pairs)
