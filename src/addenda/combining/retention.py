"""What each task keeps of its score when its adapter is combined with others: `addenda.retention`.

Task i has a score for each of its items: right or wrong, or any number where more is better. Three models answer the
same items: the base b, the adapter of the task alone a_i, and the combined one c.

    retained  = mean(c) / mean(a_i)                      what is left of the score
    gain kept = (mean(c) − mean(b)) / (mean(a_i) − mean(b))     what is left of what the adapter was trained for

Both with 95 % intervals of a paired bootstrap: one draw of items serves all three, so that items which are hard for all
do not count as a difference. Given several runs (seeds × items), seeds are drawn outside of items. A gain that the
adapter alone does not have beyond doubt is no gain to keep: then there is none in the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from addenda.core.adapter.switch import switch
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.state.state import record_of, state_of

LEVEL, DRAWS, SEED = 0.05, 2000, 20240601
Judge = Callable[[nn.Module], Sequence[float]]


@dataclass(frozen=True)
class Share:
    """A ratio of two means with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Kept:
    """One task: mean scores of the base, its adapter alone and the combined one, and what is kept.

    retained: None where the adapter alone scores 0. gain: None where its gain over the base may be none.
    """

    task: str
    base: float
    alone: float
    combined: float
    retained: Share | None
    gain: Share | None
    items: int
    runs: int = 1


@dataclass(frozen=True)
class Retention:
    """The tasks of one combined adapter."""

    name: str
    tasks: tuple[Kept, ...]

    def __str__(self) -> str:
        lines = [f"{'task':<16}{'base':>7}{'alone':>7}{self.name[:12]:>13}  {'retained':<17}{'gain kept':<17}"]
        for t in self.tasks:
            means = f"{t.base:>7.3f}{t.alone:>7.3f}{t.combined:>13.3f}"
            lines.append(
                f"{t.task[:15]:<16}{means}  {t.retained or 'no score'!s:<17}{t.gain or 'no gain'!s:<17}".rstrip()
            )
        return "\n".join(lines)


@checked()
def retention(model: nn.Module, combined: str, tasks: Mapping[str, Judge]) -> Retention:
    """Judge the base, each task's own adapter, and the combined one on every task; return what is kept.

    combined: the name of an attached adapter. tasks: by the name of the adapter that was trained for it, what returns
    a score for each item, more is better, in the same order every time; it is called with the model in the mode that it
    has. Afterwards those adapters act that acted before.

    Raises AddendaError for unknown names, a merged change, and scores that are not one finite number an item.
    """
    if not all(map(callable, tasks.values())):
        raise AddendaError(
            f"tasks is a dict, {{name of an adapter: function that scores its items}}; got {dict(tasks)}."
        )
    for name in (combined, *tasks):
        record_of(model, name)
    if not tasks:
        raise AddendaError("tasks is empty. Give {name of an adapter: function that scores its items}.")
    root, state = state_of(model)
    before = state.active
    rows = []
    try:
        for task, judge in tasks.items():
            scores = []
            for which in (None, task, combined):
                switch(root, which)
                scores.append(_numbers(task, judge(model)))
            rows.append(kept(task, *scores))
    finally:
        switch(root, before)
    return Retention(combined, tuple(rows))


def _numbers(task: str, scores: Any) -> np.ndarray:
    """Return what a judge gave as an array. Raises AddendaError where it is no list of numbers."""
    try:
        return np.asarray(list(scores), dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AddendaError(
            f"The judge of {task!r} must return a list of scores, one finite number for each item; got a "
            f"{type(scores).__name__}: {error}."
        ) from None


def kept(task: str, base: np.ndarray, alone: np.ndarray, combined: np.ndarray) -> Kept:
    """Return what a task keeps, from scores of the same items (n), or of several runs of them (seeds × n).

    Raises AddendaError where the three are not of one shape, or not finite.
    """
    shapes = {x.shape for x in (base, alone, combined)}
    x: Any = np.stack([np.atleast_2d(s) for s in (base, alone, combined)]) if len(shapes) == 1 else np.empty(0)
    if x.ndim != 3 or not x.size or not np.isfinite(x).all():
        raise AddendaError(
            f"The scores of {task!r} must be one finite number for each item, the same items each time; got shapes "
            f"{', '.join(str(s.shape) for s in (base, alone, combined))}."
        )
    _, runs, items = x.shape
    rng = np.random.default_rng(SEED)
    drawn = np.stack([_mean(x, rng.integers(runs, size=runs), rng.integers(items, size=items)) for _ in range(DRAWS)])
    b, a, c = x.mean((1, 2))
    gains = drawn[:, 1] - drawn[:, 0]
    certain = a > b and np.quantile(gains, LEVEL / 2) > 0
    shares = (drawn[:, 2] - drawn[:, 0]) / np.where(gains > 0, gains, np.nan)
    gain = _share((c - b) / (a - b), shares) if certain else None
    positive = a > 0 and bool((drawn[:, 1] > 0).all())
    retained = _share(c / a, drawn[:, 2] / drawn[:, 1]) if positive else None
    return Kept(task, float(b), float(a), float(c), retained, gain, items, runs)


def _mean(x: np.ndarray, runs: np.ndarray, items: np.ndarray) -> np.ndarray:
    return x[:, runs][:, :, items].mean((1, 2))


def _share(value: float, drawn: np.ndarray) -> Share:
    low, high = np.nanquantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    return Share(float(value), float(min(low, value)), float(max(high, value)))
