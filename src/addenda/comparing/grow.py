"""Going on with a comparison: it must be the same one, and it may grow by seeds, by methods and by its budget.

The record's `identity` holds the base, the data as it is read, every option that changes a number and the versions
that compute. A command with more seeds, more methods or a longer budget of steps or seconds takes effect: what is there
is kept, what is new is run, and `looks` says when that was asked, and after how many runs. Runs of a shorter budget
stay in the folder, and no longer count. A record without an identity is read and reported, and never extended.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from addenda.comparing.arm import Arm
from addenda.comparing.budget import Budget
from addenda.comparing.costs import Costs
from addenda.comparing.entries import MARGIN, Growth, MethodRecord
from addenda.comparing.fields import extended
from addenda.comparing.record import HEAD, Record
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings
from addenda.core.base.errors import AddendaError
from addenda.core.file.identity import base_of, goes_on, larger, longer, look, plain, versions
from addenda.models.machine import device_of

WAY = "Choose another --out, or repeat the first command to go on."


def identity_of(
    subject: Subject,
    arms: list[Arm],
    settings: TrialSettings,
    budget: Budget,
    grows: Mapping[str, Any],
    margin: float,
    asked: Mapping[str, Any],
) -> dict:
    """Return what decides the numbers of a comparison, as JSON. grows: seeds, and until when more are added.

    asked: further options as they were given.
    """
    methods = {
        a.label: {
            "options": a.method.options(defaults=True) | a.training,
            "optimizer": a.optimizer,
            "targets": a.targets if isinstance(a.targets, str) else list(a.targets),
            "also_train": list(a.also_train),
        }
        for a in arms
    }
    about = subject.about_data
    examples = {k: e.digest for k, e in subject.splits.items()}
    examples |= {f"{name} {k}": e.digest for name, c in subject.controls.items() for k, e in c.items()}
    return plain({
        "base": base_of(subject.model), "device": device_of(subject.model).type,
        "data": {"subset": about.subset, "prepared": about.prepared, "examples": examples},
        "settings": vars(settings), "of": budget.kind, "budget": budget.value,
        "steps": budget.steps if budget.kind == "parameters" else None,
        "methods": methods, **grows, "margin": float(margin), "asked": dict(asked), "versions": versions(),
    })  # fmt: skip


def open_record(out: Path) -> Record | None:
    """Return the record to go on with, or None if there is none. Raises AddendaError for one without an identity."""
    if not (out / "config.json").exists():
        return None
    record = Record.read(out)
    if record.config.identity is None:
        raise AddendaError(
            f"{out} was written by a version that did not keep which base, data and options its runs have, so it is "
            f"read and reported (addenda report {out}), and never extended. Choose another --out."
        )
    if problems := extended(record.config):
        raise AddendaError(
            f"{out / 'config.json'} cannot be gone on with: {', '.join(problems)[:1000]} missing, or not what a "
            "comparison writes. Choose another --out."
        )
    return record


def grown(record: Record, now: dict) -> Growth | None:
    """Return the look of a command that asks for more than a record; None for the same. Raises AddendaError else."""
    there = {"margin": MARGIN, **(record.config.identity or {})}
    grows = {"seeds": larger, "methods": longer, "until": _from_none, "max_minutes": lambda there, now: True}
    if there.get("of") in ("steps", "seconds"):
        grows["budget"] = larger
    larger_now = goes_on(f"The record {record.path}", there, now, grows=grows, way=WAY)
    return Growth.of(look(larger_now, f"{len(record.trials)} runs")) if larger_now else None


def told(growth: Growth) -> str:
    """Return a look in a sentence."""
    return f"Asked for on {growth.when[:10]}, after {growth.seen}: {'; '.join(map(_change, growth.changed.items()))}."


def _change(entry: tuple[str, list]) -> str:
    name, (there, now) = entry
    if name == "methods":
        return f"also {', '.join(k for k in now if k not in there)}"
    if name == "until":
        return f"until {now}"
    if name == "max_minutes":
        return "for as long as it takes" if now is None else f"within {now:g} minutes"
    return f"{name} {there:g} to {now:g}"


def _from_none(there: Any, now: Any) -> bool:
    return there is None


def cut_like(arm: Arm, known: Mapping[str, MethodRecord]) -> Arm:
    """Return an added arm with as many rates as the others have, the middle ones, where time had cut them."""
    n = max((len(m.rates or ()) for k, m in known.items() if k != HEAD), default=len(arm.rates))
    first = (len(arm.rates) - n) // 2
    return replace(arm, rates=arm.rates[first : first + n]) if 0 < n < len(arm.rates) else arm


def seconds_left(record: Record, step: Mapping[str, float], steps: Mapping[str, int], seeds: int) -> float:
    """Return what the final runs take that a record lacks with so many seeds: as long as those it has, else by steps.

    step, steps: seconds of a step and steps of a run, by arm.
    """
    total = 0.0
    for label, n in steps.items():
        done = [t.seconds or 0.0 for t in record.trials_of(label, "final") if t.steps == n]
        one = sum(done) / len(done) if done else step.get(label, 0.0) * n
        total += one * max(0, seeds - len(done))
    return total


def costs_of(record: Record, budget: Budget, search_steps: int | None, step: dict[str, float], seeds: int) -> Costs:
    """Return what the grown comparison takes, from what was measured."""
    further = (record.config.search.further if record.config.search else None) or 0
    return Costs(step, 0.0, 0.0, 0, seeds, budget, search_steps, further)
