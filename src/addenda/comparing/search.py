"""The search for a learning rate, per arm, before any final run: successive halving on the validation split.

Judged by what the comparison judges, accuracy, over two seeds: of all rates whose paired difference to the best one is
within one standard error over the items, the one with the lowest loss (Breiman et al. 1984, §3.4.3, with the loss in
the place of the size). The last rates are compared after at least half as many steps as a final run has. Where the best
has no rate below it, or none above it, that side is tried further; where that ends without one, the arm is void: its
optimum is not known, and no final run would say anything of the method.

A search is a generator: it asks for runs, a batch at a time, and is sent what they gave in the same order. Whoever
drives it decides where they run: one after another, several at once, or on other machines.
"""

import math
from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from addenda.comparing.entries import TrialRecord

SEEDS = (1000, 1001)  # of the runs of a search: none that a final run has
LEAST = 3  # rates, where any are searched
FURTHER = 4  # rates beyond the grid at most, together: two decades


@dataclass(frozen=True)
class Look:
    """A run that a search asks for."""

    rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Chosen:
    """What a search ends with: a rate, or None and why the arm is void."""

    rate: float | None
    why: str | None = None


@dataclass(frozen=True)
class Score:
    """What the runs of one rate gave on validation, their mean; items: of each item, None where they were not kept.

    accuracy: minus infinity where a run diverged, 0 where none is measured.
    """

    accuracy: float
    loss: float
    items: np.ndarray | None = None

    @property
    def diverged(self) -> bool:
        """Whether a run at this rate diverged."""
        return self.accuracy == -math.inf

    def within(self, best: "Score") -> bool:
        """Return whether `best` is not better by more than one standard error of the paired difference."""
        gap = best.accuracy - self.accuracy
        if not gap > 0:  # two that diverged, too
            return True
        if best.items is None or self.items is None or len(self.items) != len(best.items) or len(self.items) < 2:
            return False
        error = float((best.items - self.items).std(ddof=1)) / math.sqrt(len(self.items))
        return gap <= error * (1 + 1e-9)


Search = Generator[list[Look], Sequence[TrialRecord], Chosen]
K = TypeVar("K", bound=Hashable)


def grid(center: float, n: int) -> tuple[float, ...]:
    """Return n rates around a centre, a factor of √10 apart, to two digits: 3 around 1e-3 are 3.2e-4, 1e-3, 3.2e-3."""
    shift = (n - 1) / 2
    return tuple(float(f"{center * 10 ** ((i - shift) / 2):.1e}") for i in range(n))


def rungs(rates: int, first: int, last: int) -> list[tuple[int, int]]:
    """Return (rates, steps) of every rung: half of them go on, for twice as long; the last two for `last` steps."""
    if rates < 2:
        return []
    if first >= last or rates == 2:
        return [(rates, max(first, last))]
    count, steps = max(2, rates // 2), min(2 * first, last)
    return [(rates, first), *rungs(count, steps, last)]


def last_steps(first: int, final: int) -> int:
    """Return the steps of a search's last runs: at least half of a final run's."""
    return max(first, math.ceil(final / 2))


def cost(rates: int, first: int, last: int, further: int = FURTHER) -> tuple[int, int]:
    """Return how many runs, and steps in all of them, the search of one arm takes at most."""
    ladder = rungs(rates, first, last)
    further = further if ladder else 0
    runs = sum(count for count, _ in ladder) + further
    steps = sum(count * steps for count, steps in ladder) + (further * ladder[-1][1] if ladder else 0)
    return len(SEEDS) * runs, len(SEEDS) * steps


def search(rates: Sequence[float], first: int, last: int, further: int = FURTHER) -> Search:
    """Ask for runs until the best rate is known, and lies between others that were tried. One rate: asks for none.

    first, last: steps of the first and of the last runs; further: how many rates beyond the grid may be tried in all.
    Where all of a rung diverged the next lower rate is tried. A diverged run counts as infinitely bad.
    """
    if len(rates) == 1:
        return Chosen(rates[0])
    factor, tried, middle = rates[1] / rates[0], set(rates), _middle(rates)
    order = sorted(tried)
    for count, steps in rungs(len(rates), first, last):
        found: dict[float, Score] = {}
        asked = order[:count]
        while asked:
            looks = [Look(rate, seed, steps) for rate in asked for seed in SEEDS]
            runs = yield looks
            for i, rate in enumerate(asked):
                found[rate] = score(runs[i * len(SEEDS) : (i + 1) * len(SEEDS)])
            tried.update(asked)
            order = ranked({r: found[r] for r in sorted(found, key=lambda r: abs(math.log(r / middle)))})
            beyond = _beyond(order[0], found, tried, factor)
            if beyond is None:
                break
            if not further:
                return Chosen(None, _why(order[0], found, tried))
            asked, further = [beyond], further - 1
    return Chosen(order[0])


def _beyond(best: float, found: Mapping[float, Score], tried: Collection[float], factor: float) -> float | None:
    """Return the rate to try next, None where the best lies between others."""
    if found[best].diverged:
        lowest = min(found)
        return max((r for r in tried if r < lowest), default=float(f"{lowest / factor:.1e}"))
    if best == max(tried):
        return float(f"{best * factor:.1e}")
    return float(f"{best / factor:.1e}") if best == min(tried) else None


def _why(best: float, found: Mapping[float, Score], tried: Collection[float]) -> str:
    """Return why the arm is void."""
    low, high = min(tried), max(tried)
    if found[best].diverged:
        return f"every rate diverged, from {min(found):g} to {max(found):g}"
    end, other = ("highest", f"from {low:g} on") if best == high else ("lowest", f"up to {high:g}")
    return f"the best rate, {best:g}, is the {end} that was tried ({other}): its optimum lies beyond"


def _middle(rates: Sequence[float]) -> float:
    """Return the middle of a grid; of rates without any difference the nearest to it is taken."""
    return math.sqrt(min(rates) * max(rates))


def ranked(scores: Mapping[K, Score]) -> list[K]:
    """Return the keys, the best first: those within one standard error of it by loss, then the others by accuracy."""
    best = max(scores.values(), key=lambda s: (s.accuracy, -s.loss))
    tied = {key: s.within(best) for key, s in scores.items()}
    return sorted(scores, key=lambda k: (not tied[k], scores[k].loss if tied[k] else -scores[k].accuracy))


def score(runs: Sequence[TrialRecord]) -> Score:
    """Return the score of the runs at one rate, one a seed."""
    looks = [run.last_look for run in runs if run.status == "ok"]
    losses = [math.nan if look is None or look.loss is None else look.loss for look in looks]
    if len(losses) < len(runs) or not all(map(math.isfinite, losses)):
        return Score(-math.inf, math.inf)
    right = [look.accuracy for look in looks if look is not None and look.accuracy is not None]
    items = [look.items for look in looks if look is not None and look.items]
    kept = len(items) == len(runs) and len({len(i) for i in items}) == 1
    answers = np.array([[c == "1" for c in i] for i in items], dtype=float).mean(0) if kept else None
    accuracy = float(np.mean(right)) if len(right) == len(runs) else 0.0
    return Score(accuracy, float(np.mean(losses)), answers)


def side_by_side(
    searches: Mapping[str, Search],
    run: Callable[[list[tuple[str, Look]]], Sequence[TrialRecord]],
    keep: int | None = None,
    rivals: Collection[str] = (),
) -> dict[str, Chosen]:
    """Drive the searches of several arms, what all of them ask for together; return what each has found.

    keep: how many of the `rivals` go on after their first runs, the best by the rule above; None: all.
    """
    found: dict[str, Chosen] = {}
    going = dict(searches)
    sent: dict[str, Sequence[TrialRecord] | None] = dict.fromkeys(going)
    first = True
    while going:
        asked: dict[str, list[Look]] = {}
        for label, one in list(going.items()):
            try:
                asked[label] = one.send(sent[label])  # type: ignore[arg-type]
            except StopIteration as end:
                found[label] = end.value
                del going[label]
        made = iter(run([(label, look) for label, looks in asked.items() for look in looks]) if asked else ())
        sent = {label: [next(made) for _ in looks] for label, looks in asked.items()}
        if first and keep is not None:
            bests = {k: _best(asked[k], sent[k] or ()) for k in rivals if k in asked}
            for label, why in _left(bests, keep).items():
                found[label] = Chosen(None, why)
                going.pop(label).close()
        first = False
    return {label: found[label] for label in searches}


def _best(looks: Sequence[Look], runs: Sequence[TrialRecord]) -> Score:
    """Return the best score of an arm's first runs."""
    by_rate: dict[float, list[TrialRecord]] = {}
    for look, run in zip(looks, runs, strict=True):
        by_rate.setdefault(look.rate, []).append(run)
    scores = {rate: score(of) for rate, of in by_rate.items()}
    return scores[ranked(scores)[0]]


def _left(bests: Mapping[str, Score], keep: int) -> dict[str, str]:
    """Return the arms that do not go on, and why."""
    order = ranked(bests) if bests else []
    return {
        label: f"left after its first runs, for the time: {_told(bests[label])} on validation, and "
        f"{_told(bests[order[keep - 1]])} for the last of the {keep} that went on"
        for label in order[keep:]
    }


def _told(score: Score) -> str:
    return "diverged at every rate" if score.diverged else f"{score.accuracy:.1%} right, loss {score.loss:.3f},"
