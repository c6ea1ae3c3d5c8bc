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
from addenda.comparing.costs import NO_TEXT, Costs, step_seconds
from addenda.comparing.entries import MARGIN, Growth, MethodRecord
from addenda.comparing.fields import extended
from addenda.comparing.record import HEAD, Record, other_hardware
from addenda.comparing.request import Request, Watch
from addenda.comparing.search import cost
from addenda.comparing.start import about, named_by, options_of, titled
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings
from addenda.comparing.until import NO_MORE, planned
from addenda.comparing.words import minutes
from addenda.core.base.errors import AddendaError
from addenda.core.file.identity import base_of, goes_on, larger, longer, look, plain, versions
from addenda.models.machine import device_of, hardware
from addenda.statistics.spending import LOOKS
from addenda.train import attention

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


def gone_on(record: Record, request: Request, watch: Watch) -> Record:
    """Return the record as this command has it: the same, or larger, which is measured and noted."""
    known, growth = record.config, grown(record, dict(request.identity))
    here, notes, until = hardware(), list(known.notes), known.until
    if known.hardware != here and (note := other_hardware(here)) not in notes:
        notes.append(note)
    if until is not None and until.stopped == NO_MORE and not request.of_number:  # until decided is asked for now
        until = replace(until, stopped=None)
    if growth is None:
        same = replace(known, notes=tuple(notes), until=until)
        return record if same == known else record.changed(same)
    new = [cut_like(a, known.methods) for a in request.arms if a.label not in known.identified]
    attention.put(request.subject.model, known.model.attention)
    step = dict(known.measured_step_seconds or {})
    step |= {a.label: step_seconds(request.subject, a, request.settings, watch.say) for a in new}
    wanted = [*(a for a in request.arms if a.label in known.methods), *new]
    costs = costs_of(record, request, step)
    count = {a.label: costs.steps(a) for a in wanted}
    methods = {a.label: about(a, request.subject, count[a.label]) for a in wanted}
    again = {k for k, m in known.methods.items() if m.steps != count.get(k)}  # a longer budget: searched anew
    methods |= {k: replace(methods[k], rates=m.rates, void=None if k in again else m.void)
                for k, m in known.methods.items() if k in methods}  # fmt: skip
    search = known.search and replace(
        known.search,
        rates={**(known.search.rates or {}), **{a.label: a.rates for a in new if len(a.rates) > 1}},
        steps={a.label: costs.first(a) for a in wanted},
    )
    title = known.title if known.title != named_by(known.methods, known.data) else named_by(methods, known.data)
    config = replace(
        known, title=title, methods=titled(methods), seeds=tuple(range(request.seeds)), identity=request.identity,
        measured_step_seconds=step, looks=(*(known.looks or ()), growth), search=search, notes=(*notes, told(growth)),
        budget=replace(known.budget, value=request.budget.value, steps=max(count.values())), options=request.options,
    )  # fmt: skip
    searched = [a for a in wanted if a.label in again or a in new]
    searching = sum(step[a.label] * cost(len(a.rates), costs.first(a), costs.last(a), 1)[1] for a in searched)
    run = {a: n for a, n in count.items() if methods[a].void is None}
    if request.until is not None:
        spent = sum(t.seconds or 0.0 for t in (*record.trials, *record.shorter))
        seconds = [(spent + searching + seconds_left(record, step, run, n)) / request.workers for n in LOOKS]
        first = None if request.of_number else request.seeds
        config = replace(config, until=planned(known.until, seconds, request.max_minutes, first))
    left = (searching + seconds_left(record, step, run, request.seeds)) / request.workers
    watch.say(told(growth))
    if not watch.ask(f"Run what is new for about {minutes(left)}?"):
        raise AddendaError(f"Nothing was run. {record.path} is as it was.")
    return record.changed(config)


def as_recorded(arms: list[Arm], record: Record) -> list[Arm]:
    """Return the arms of an earlier call with what it decided (dropped rates and arms, sizes); raise for others."""
    known = record.config.methods
    kept = {arm.label: arm for arm in arms if arm.label in known}
    if set(known) - set(kept):
        raise AddendaError(
            f"{record.path} compares {', '.join(known)}, and this command names {', '.join(a.label for a in arms)}. "
            "Choose another --out, or repeat the first command to go on."
        )
    differing = [k for k, arm in kept.items() if options_of(arm) != known[k].options]
    if differing:
        raise AddendaError(f"{record.path} has other options for {', '.join(differing)}. Choose another --out.")
    return [replace(kept[label], rates=method.rates or ()) for label, method in known.items()]


def as_read(subject: Subject, record: Record, general: str | Path | None, watch: Watch) -> Subject:
    """Return the subject with the record's general text; without one, where this machine's is another."""
    there, now = record.config.data.general, subject.about_data.general
    if there == now:
        return subject
    if there is None and any(note.startswith(NO_TEXT) for note in record.config.notes):  # time left it out
        return subject.reading(None)
    if general not in (None, "auto"):
        raise AddendaError(
            f"{record.path} measures forgetting on {there.name if there else 'no text'}, and not on the text of "
            f"{general}. Choose another --out, or leave general= out."
        )
    if there is not None and general is not None:
        watch.say(
            f"The general text of {record.path} ({there.name}, Python {there.python or '–'}) is not here: "
            "no forgetting is measured in the runs that follow."
        )
    return subject.reading(None)


def as_judged(subject: Subject, record: Record) -> Subject:
    """Return the subject, of the recorded data and form; raise for others."""
    there, now = record.config.data, subject.about_data
    held = {k: (getattr(there, k), getattr(now, k)) for k in ("hashes", "subset", "prepared")}
    if other := [k for k, (before, here) in held.items() if before is not None and before != here]:
        raise AddendaError(f"{record.path} is about other data ({', '.join(other)} differ). Choose another --out.")
    form, asked = record.config.model.quantize, subject.about_model.quantize
    if form != asked:
        raise AddendaError(f"{record.path} has the base in the form {form}, not {asked}. Choose another --out.")
    return subject


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


def costs_of(record: Record, request: Request, step: dict[str, float]) -> Costs:
    """Return what the grown comparison takes, from what was measured."""
    further = (record.config.search.further if record.config.search else None) or 0
    return Costs(step, 0.0, 0.0, 0, request.seeds, request.budget, request.search_steps, further)
