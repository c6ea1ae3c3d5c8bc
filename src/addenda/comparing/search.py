"""The learning-rate search: successive halving on the validation loss, per arm, before any final run."""

import math
from collections.abc import Callable

from addenda.comparing.entries import TrialRecord


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


def search(rates: tuple[float, ...], steps: int, run: Callable[[float, int], TrialRecord], further: int = 1) -> float:
    """Return the best rate. run(rate, steps): what such a run gives; a diverged one counts as infinitely bad.

    Where the best lies at an edge of the grid, up to `further` rates beyond that edge are tried, each as long as the
    first rung, while they are better.
    """
    if len(rates) == 1:
        return rates[0]
    left, first = list(rates), {}
    for count, length in rungs(len(rates), steps):
        scores = {rate: _score(run(rate, length)) for rate in left[:count]}
        first = first or scores
        left = sorted(scores, key=lambda r: (scores[r], r))[: max(1, count // 2)]
    best, factor = left[0], rates[1] / rates[0]
    for _ in range(further):
        if min(first) < best < max(first):
            break
        beyond = float(f"{best * factor if best == max(first) else best / factor:.1e}")
        first[beyond] = _score(run(beyond, steps))
        if first[beyond] >= first[best]:
            break
        best = beyond
    return best


def _score(trial: TrialRecord) -> float:
    loss = trial.last_look.loss if trial.status == "ok" and trial.last_look else None
    return loss if loss is not None and math.isfinite(loss) else math.inf


def cost(rates: int, steps: int, further: int = 1) -> int:
    """Return steps that the search of one arm may take, `further` rates beyond the grid included."""
    return sum(n * s for n, s in rungs(rates, steps)) + (further * steps if rates > 1 else 0)
