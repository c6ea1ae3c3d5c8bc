"""What a comparison of a few seeds on a few hundred shared items allows one to say, and no more.

An arm is a 0/1 array of seeds × items. Seeds and items both vary, and both count (`intervals`); a pair of arms is
compared on the differences of the same items and seeds, and judged (`verdicts`). Two or three seeds tell little of what
the next would give, so the variance over seeds is pooled over arms; one seed tells nothing, and then nothing is
decided. A control has no seed, hence no variance over seeds. Arms that are void are in no test.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from scipy import stats

from addenda.comparing.entries import MARGIN, TrialRecord
from addenda.comparing.record import FULL, HEAD, Record
from addenda.core.base.errors import AddendaError
from addenda.statistics.intervals import Answers, Pool, Pooled, of_answers, paired, quantile, spread
from addenda.statistics.verdicts import LEVEL, Measured, PairedDifference, judged, measured, unknown


@dataclass(frozen=True)
class Estimate:
    """Mean accuracy of an arm in 0..1 with its 95 % interval; `runs` are the seeds' own means, in seed order."""

    mean: float
    low: float
    high: float
    runs: tuple[float, ...]
    items: int


@dataclass(frozen=True)
class Comparison:
    """The statistics of one record. `test` and `ood` are keyed by arm; letters and pairs leave the lesser control out.

    Two arms that share a letter are not known to differ. `leaders` are the fitted methods that no other fitted method
    beats, those with a diverged run left out; `control` is the best control that is not fully fine-tuned, over which
    gains count: of the bare base, or a new head alone; `diverged` maps an arm to its failed seeds, `void` one that
    cannot be judged to why. margin: what counts as equal, as a share of 1.
    """

    test: dict[str, Estimate]
    ood: dict[str, Estimate]
    pairs: tuple[PairedDifference, ...]
    letters: dict[str, str]
    leaders: tuple[str, ...]
    control: str | None
    diverged: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()
    void: dict[str, str] = field(default_factory=dict)
    margin: float = MARGIN / 100

    def pair(self, a: str, b: str) -> PairedDifference | None:
        """Return the pair in whichever order it was compared, or None if it was not."""
        return next((p for p in self.pairs if {p.a, p.b} == {a, b}), None)

    def between(self, a: str, b: str) -> PairedDifference | None:
        """Return `a` minus `b`, or None if the two were not compared."""
        pair = self.pair(a, b)
        return pair.turned() if pair and pair.a != a else pair

    def beats(self, a: str, b: str) -> bool:
        """Return whether `a` is better than `b`: not by chance, by however little."""
        pair = self.pair(a, b)
        return pair is not None and pair.better == a

    def not_worse(self, a: str, b: str) -> bool:
        """Return whether `a` is worse than `b` by less than the margin, at 95 % (one-sided). Of void arms: False."""
        if a == b:
            return a not in self.void
        pair = self.between(a, b)
        return pair is not None and pair.verdict != "void" and pair.low90 > -self.margin


def analyse(record: Record) -> Comparison:
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
    void = {arm: method.void for arm, method in record.config.methods.items() if method.void}
    void |= {arm: "every run diverged" for arm, seeds in diverged.items() if len(seeds) == len(runs[arm])}
    margin = (MARGIN if record.config.margin is None else record.config.margin) / 100
    test, ood = _arms(runs, "test"), _arms(runs, "ood")
    if not test:
        raise AddendaError(
            f"The record {record.path} has no finished run with test items yet, so there is nothing to compare. "
            "Repeat the `addenda compare` command with this --out: it goes on where it stopped."
        )
    fitted = [a for a in test if runs[a][0].stage == "final"]
    controls = [a for a in test if (a not in fitted or a == HEAD) and a not in void]
    control = max(controls, key=lambda a: np.mean([x.mean() for x in test[a].values()])) if controls else None
    sound = [a for a in fitted if a not in diverged and a not in void]
    pool = _pool(test, sound)
    estimates = _estimates(test, pool)
    arms = [*fitted, control] if control and control not in fitted else fitted
    ranked = sorted(arms, key=lambda a: -estimates[a].mean)
    until = record.config.until is not None
    pairs = judged([_pair(a, b, test, pool, void, margin, until) for a, b in combinations(ranked, 2)], until)
    methods = [a for a in ranked if a in fitted and a not in (FULL, HEAD)]
    beaten = {p.b if p.better == p.a else p.a for p in pairs if p.better and {p.a, p.b} <= set(methods)}
    caveats = []
    if fitted and all(len(test[a]) < 2 for a in fitted):
        caveats.append("No arm has two seeds: these statements are about these runs, not about the methods.")
    for arm, seeds in diverged.items():
        caveats.append(
            f"{arm}: {len(seeds)} of {len(runs[arm])} runs diverged; such a run counts with its measured answers, "
            "or as all wrong where none could be measured."
        )
    return Comparison(
        estimates,
        _estimates(ood, _pool(ood, [a for a in sound if a in ood])),
        pairs,
        letters([a for a in ranked if a not in void], [(p.a, p.b) for p in pairs if p.better]),
        tuple(a for a in methods if a not in beaten and a not in diverged and a not in void),
        control,
        diverged,
        tuple(caveats),
        void,
        margin,
    )


def letters(ranked: Sequence[str], different: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a compact letter display (Piepho 2004, insert and absorb): arms share a letter iff not told apart."""
    columns = {frozenset(ranked)}
    for pair in map(frozenset, different):
        columns = {c - {x} for c in columns for x in pair if pair <= c} | {c for c in columns if not pair <= c}
        columns = {c for c in columns if not any(c < other for other in columns)}
    ordered = sorted(columns, key=lambda c: sorted(ranked.index(a) for a in c))
    names = [chr(97 + i) if i < 26 else f"z{i - 25}" for i in range(len(ordered))]
    return {a: "".join(n for n, c in zip(names, ordered, strict=True) if a in c) for a in ranked}


def _pair(
    a: str, b: str, arms: Mapping[str, Answers], pool: Pool, void: Mapping[str, str], margin: float, until: bool
) -> Measured:
    """Return the difference of two arms on what both have answered; unknown where one is void, or nothing is shared."""
    if a in void or b in void:
        which = a if a in void else b
        return unknown(a, b, margin, f"{which} is void: {void[which]}", "void")
    differences = paired(arms[a], arms[b])  # seeds × items
    if differences is None:  # an interrupted comparison
        return unknown(a, b, margin, "no seed that both have finished")
    by_seed = differences.mean(1)
    of_fitted = next((arm for arm, other in ((a, b), (b, a)) if None in arms[other]), None)  # the other has no seeds
    pooled = pool.of_pair(a, b, by_seed) if of_fitted is None else pool.of_arm(of_fitted, by_seed)
    return measured(a, b, differences, pooled, margin, until)


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


def _pool(arms: Mapping[str, Answers], sound: Iterable[str]) -> Pool:
    return Pool.of({arm: {s: float(x.mean()) for s, x in arms[arm].items() if s is not None} for arm in sound})


def _estimates(arms: Mapping[str, Answers], pool: Pool) -> dict[str, Estimate]:
    estimates = {}
    for arm, runs in arms.items():
        x = np.stack(list(runs.values()))
        items, mean = x.shape[1], float(x.mean())
        over_seeds = Pooled() if None in runs else pool.of_arm(arm, x.mean(1))
        error, df = (float(v) for v in spread(*of_answers(x, over_seeds), items, over_seeds.freedom))
        half, right = quantile(1 - LEVEL / 2, df) * error, round(mean * items)
        low, high = mean - half, mean + half
        if min(right, items - right) < 5:  # no normal approximation near 0 or all
            exact = stats.binomtest(right, items).proportion_ci(1 - LEVEL, "exact")
            low, high = min(low, exact.low), max(high, exact.high)
        runs_ = tuple(float(m) for m in x.mean(1))
        estimates[arm] = Estimate(mean, max(low, 0.0), min(high, 1.0), runs_, items)
    return estimates
