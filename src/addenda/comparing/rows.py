"""The rows of a report's main table: what is known of each arm, from its runs and from what was written of it."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from addenda.comparing.entries import MethodRecord, TrialRecord
from addenda.comparing.forgetting import Change, forgetting
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.stats import Comparison, Estimate
from addenda.comparing.words import rate

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """The row of one arm. leads: no other beats it; diverged: its failed seeds; finished, wanted: numbers of runs.

    train_seconds: of all steps of one run, without what is judged meanwhile. forgot: how much worse it has become on
    the general text, where that was measured.
    """

    arm: str
    title: str
    hypothesis: str
    options: str
    control: bool
    leads: bool
    diverged: tuple[int | None, ...]
    finished: int
    wanted: int
    notes: list[str]
    trainable: int | None
    adapter_bytes: int | None
    step_seconds: float | None
    train_seconds: float | None
    peak_bytes: int | None
    rate: str
    test: Estimate | None
    ood: Estimate | None
    letters: str
    forgot: Change | None


def titles_of(record: Record) -> dict[str, str]:
    """Return what each arm is called, by label."""
    names = {t.method: t.method for t in record.trials} | {m: m for m in record.config.methods}
    shots = {m: m.removeprefix("base").strip() for m in names if m.startswith("base")}
    base = {m: f"Base, {s or 'zero-shot'}" for m, s in shots.items()}
    return names | base | {m: m if c.title is None else c.title for m, c in record.config.methods.items()}


def rows_of(record: Record, comparison: Comparison) -> list[Row]:
    """Return one row per arm, fitted methods by accuracy first, then the controls; unfinished ones are there too."""
    titles, methods = titles_of(record), record.config.methods
    controls = [arm for arm in dict.fromkeys(t.method for t in record.trials) if arm not in methods]
    rows, forgot = [], forgetting(record)
    for arm in [*methods, *controls]:
        method = methods.get(arm, MethodRecord())
        runs = [t for t in record.trials_of(arm) if t.stage != "search"]
        rates = dict.fromkeys(rate(r) for r in sorted(_known(runs, lambda t: t.rate)))
        trainable = _known(runs, lambda t: t.trainable)
        seconds = _known(runs, lambda t: t.step_seconds)
        trained = _known(runs, _train_seconds)
        rows.append(
            Row(
                arm=arm,
                title=titles[arm],
                hypothesis=method.hypothesis or "",
                options=", ".join(f"{k} {v}" for k, v in (method.options or {}).items()),
                control=arm in (FULL, HEAD) or arm not in methods,
                leads=arm in comparison.leaders,
                diverged=comparison.diverged.get(arm, ()),
                finished=len(runs),
                wanted=0 if method.void is not None else len(record.config.seeds) if arm in methods else 1,
                notes=[t.note for t in runs if t.note],
                trainable=next(iter(trainable), None) if method.trainable is None else method.trainable,
                adapter_bytes=max(_known(runs, lambda t: t.adapter_bytes), default=None),
                step_seconds=median(seconds) if seconds else None,
                train_seconds=median(trained) if trained else None,
                peak_bytes=max(_known(runs, lambda t: t.peak_bytes), default=None),
                rate=", ".join(rates) or "–",
                test=comparison.test.get(arm),
                ood=comparison.ood.get(arm),
                letters=comparison.letters.get(arm, ""),
                forgot=forgot.get(arm),
            )
        )
    return sorted(rows, key=lambda r: (r.control, -(r.test.mean if r.test else -1)))


def _train_seconds(trial: TrialRecord) -> float | None:
    return None if trial.step_seconds is None or trial.steps is None else trial.step_seconds * trial.steps


def _known(runs: list[TrialRecord], of: Callable[[TrialRecord], T | None]) -> list[T]:
    """Return a number of every run that has it."""
    return [value for t in runs if (value := of(t)) is not None]
