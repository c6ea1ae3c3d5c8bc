"""How much each arm has forgotten: its loss on a general text against the base's, in nats a token.

A difference is taken window by window, as all runs read the same ones, and its error is that of `intervals`: windows
and seeds both vary. Arms are contrasted at the seeds that they share, with Holm over the pairs. The looks of a
comparison that goes on until it is decided follow accuracy, so nothing is spent here. Diverged runs do not count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from addenda.comparing.record import BASE, Record
from addenda.comparing.words import listed, nats
from addenda.statistics.intervals import Pool, Pooled, of_answers, quantile, spread, two_sided
from addenda.statistics.verdicts import LEVEL, holm

Losses = Mapping[int | None, np.ndarray]  # {seed: difference of each window}


@dataclass(frozen=True)
class Change:
    """An arm's loss minus the base's, mean over windows and seeds, with its 95 % interval. Above 0: forgotten."""

    mean: float
    low: float
    high: float
    seeds: int
    windows: int

    def __str__(self) -> str:
        return f"{nats(self.mean)} ({nats(self.low)} to {nats(self.high)})"


@dataclass(frozen=True)
class Contrast:
    """How much more arm `b` has forgotten than arm `a`, with its 95 % interval, p, and Holm's p over all pairs."""

    a: str
    b: str
    change: Change
    p: float
    p_holm: float

    @property
    def apart(self) -> bool:
        """Whether the two are told apart."""
        return self.p_holm < LEVEL and (self.change.low > 0 or self.change.high < 0)


def forgetting(record: Record) -> dict[str, Change]:
    """Return the change of every arm that has one: none without the base's losses, as in older records."""
    arms = _arms(record)
    pool, by_arm = _pool(arms), {arm: np.stack(list(runs.values())) for arm, runs in arms.items()}
    return {arm: _change(x, pool.of_arm(arm, x.mean(1)))[0] for arm, x in by_arm.items()}


def contrasts(record: Record) -> tuple[Contrast, ...]:
    """Return every pair of arms that share a seed, who forgot less first."""
    arms = _arms(record)
    pool, found = _pool(arms), []
    for a, b in combinations(sorted(arms, key=lambda a: np.mean([x.mean() for x in arms[a].values()])), 2):
        seeds = [s for s in arms[a] if s in arms[b]]
        if seeds:
            x = np.stack([arms[b][s] - arms[a][s] for s in seeds])
            pooled = pool.of_pair(a, b, x.mean(1))
            change, p = _change(x, pooled)
            p = p if pooled.freedom else 1.0  # one seed does not tell what another would give
            found.append(Contrast(a, b, change, p, p))
    corrected = holm({i: contrast.p for i, contrast in enumerate(found)})
    return tuple(replace(contrast, p_holm=corrected[i]) for i, contrast in enumerate(found))


def told(record: Record, titles: Mapping[str, str]) -> str | None:
    """Return who forgot least and what is known of the others, a sentence; None with fewer than two arms."""
    pairs = contrasts(record)
    if not pairs:
        return None
    least = pairs[0].a
    of_least = [c for c in pairs if c.a == least]
    more = [f"{titles[c.b]} by {c.change} nats" for c in of_least if c.apart]
    alike = [titles[c.b] for c in of_least if not c.apart]
    clauses = [f"less than {listed(more)}"] if more else []
    clauses += [f"not told apart from {listed(alike)}"] if alike else []
    return f"On the general text {titles[least]} forgets least: {', '.join(clauses)}."


def listing(record: Record, titles: Mapping[str, str]) -> str | None:
    """Return every arm's change and who forgot least, in sentences; None where nothing was measured."""
    changes, text = forgetting(record), record.config.data.general
    if not changes:
        return None
    on = "a general text" if text is None or text.name is None else text.name
    each = listed(f"{titles[arm]} {change}" for arm, change in changes.items())
    return " ".join(s for s in (f"Forgetting, nats a token on {on}: {each}.", told(record, titles)) if s)


def _arms(record: Record) -> dict[str, Losses]:
    """Return {arm: {seed: loss minus the base's, by window}} of all finished runs that have every number."""
    base = next((t.general.losses for t in record.trials_of(BASE, "control") if t.general), None)
    if base is None or None in base:
        return {}
    arms: dict[str, dict[int | None, np.ndarray]] = {}
    for trial in record.trials_of(stage="final"):
        losses = trial.general.losses if trial.general and trial.status == "ok" else None
        if losses is not None and None not in losses:
            arms.setdefault(trial.method, {})[trial.seed] = np.array(losses, float) - np.array(base, float)
    return {arm: arms[arm] for arm in record.config.methods if arm in arms}


def _pool(arms: Mapping[str, Losses]) -> Pool:
    return Pool.of({arm: {s: float(x.mean()) for s, x in runs.items() if s is not None} for arm, runs in arms.items()})


def _change(x: np.ndarray, pooled: Pooled) -> tuple[Change, float]:
    """Return the change of x, seeds × windows, and the p of none."""
    seeds, windows = x.shape
    error, df = (float(v) for v in spread(*of_answers(x, pooled), windows, pooled.freedom))
    mean = float(x.mean())
    half = quantile(1 - LEVEL / 2, df) * error if windows > 1 else float("inf")
    return Change(mean, mean - half, mean + half, seeds, windows), two_sided(mean, error, df)
