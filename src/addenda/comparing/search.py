"""The learning-rate search: successive halving on the validation loss, per arm, before any final run.

A search is a generator: it asks for runs, a batch at a time, and is sent what they gave in the same order. Whoever
drives it decides where they run: one after another, several at once, or on other machines.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from addenda.comparing.entries import TrialRecord

SEEDS = (1000,)  # of the runs of a search: none that a final run has


@dataclass(frozen=True)
class Look:
    """A run that a search asks for."""

    rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Chosen:
    """What a search ends with: a rate."""

    rate: float


Search = Generator[list[Look], Sequence[TrialRecord], Chosen]


def grid(center: float, n: int) -> tuple[float, ...]:
    """Return n rates around a centre, a factor of √10 apart, to two digits: 3 around 1e-3 are 3.2e-4, 1e-3, 3.2e-3."""
    shift = (n - 1) / 2
    return tuple(float(f"{center * 10 ** ((i - shift) / 2):.1e}") for i in range(n))


def rungs(rates: int, steps: int) -> list[tuple[int, int]]:
    """Return (rates, steps) of every rung: half of them go on, for twice as long, until one is left."""
    ladder = []
    while rates > 1:
        ladder.append((rates, steps))
        rates, steps = rates // 2, steps * 2
    return ladder


def search(rates: tuple[float, ...], steps: int, further: int = 1) -> Search:
    """Ask for runs until the best rate is known. A diverged run counts as infinitely bad.

    Where the best lies at an edge of the grid, up to `further` rates beyond that edge are tried, each as long as the
    first rung, while they are better.
    """
    if len(rates) == 1:
        return Chosen(rates[0])
    left: list[float] = list(rates)
    first: dict[float, float] = {}
    for count, length in rungs(len(rates), steps):
        asked = [Look(rate, seed, length) for rate in left[:count] for seed in SEEDS]
        scores = {look.rate: _score(run) for look, run in zip(asked, (yield asked), strict=True)}
        first = first or scores
        left = sorted(scores, key=lambda r: (scores[r], r))[: max(1, count // 2)]
    best, factor = left[0], rates[1] / rates[0]
    for _ in range(further):
        if min(first) < best < max(first):
            break
        beyond = float(f"{best * factor if best == max(first) else best / factor:.1e}")
        (run,) = yield [Look(beyond, SEEDS[0], steps)]
        first[beyond] = _score(run)
        if first[beyond] >= first[best]:
            break
        best = beyond
    return Chosen(best)


def driven(search: Search, run: Callable[[Look], TrialRecord]) -> Chosen:
    """Run what a search asks for, one after another, to its end."""
    try:
        asked = next(search)
        while True:
            asked = search.send([run(look) for look in asked])
    except StopIteration as end:
        return end.value


def _score(trial: TrialRecord) -> float:
    loss = trial.last_look.loss if trial.status == "ok" and trial.last_look else None
    return loss if loss is not None and math.isfinite(loss) else math.inf


def cost(rates: int, steps: int, further: int = 1) -> int:
    """Return steps that the search of one arm may take, `further` rates beyond the grid included."""
    return sum(n * s for n, s in rungs(rates, steps)) + (further * steps if rates > 1 else 0)
