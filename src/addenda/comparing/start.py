"""The beginning of a comparison: steps are measured, the whole is predicted, and its configuration is written."""

import datetime
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from addenda.comparing.arm import Arm
from addenda.comparing.costs import Costs, by_the_clock, fit_within, measure
from addenda.comparing.entries import BudgetRecord, Config, DataRecord, MethodRecord, SearchRecord
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.request import Request, Watch
from addenda.comparing.search import FURTHER
from addenda.comparing.subject import Subject
from addenda.comparing.until import planned, range_of
from addenda.comparing.words import minutes
from addenda.core.ask.plan import plan
from addenda.core.base.errors import AddendaError
from addenda.core.method.catalogue import info
from addenda.models.machine import hardware, versions
from addenda.statistics.spending import LOOKS
from addenda.train import attention

KIND = "successive halving, by accuracy within one standard error"


def begin(out: Path, request: Request, watch: Watch) -> tuple[Record, list[Arm], Subject]:
    """Measure, predict, drop what does not fit, ask, and write the configuration."""
    subject, arms, budget, within = request.subject, request.arms, request.budget, request.within
    clocked = by_the_clock(budget, within)
    for note in clocked:
        watch.say(note)
    if subject.attention is None:
        chosen = attention.settled(subject.model, subject.splits["train"], request.settings.batch)
    else:
        chosen = attention.Attention(subject.attention)
    attention.put(subject.model, chosen.name)
    costs = measure(
        subject, arms, request.settings, budget, request.seeds, request.search_steps, FURTHER, watch.say,
        request.workers,
    )  # fmt: skip
    measured, notes = costs.step, _left_out(subject)
    if within is not None:
        costs, arms, subject, dropped = fit_within(costs, arms, subject, within)
        notes += dropped
    steps = {arm.label: costs.steps(arm) for arm in arms}
    total = costs.total(arms)
    until = None
    if request.until is not None:
        seconds = [replace(costs, seeds=n).total(arms) for n in LOOKS]
        until = planned(None, seconds, request.max_minutes, LOOKS[0])
    config = Config(
        title=request.title or named_by([a.label for a in arms], subject.about_data),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=request.command,
        model=replace(subject.about_model, attention=chosen.name, attention_seconds=chosen.seconds),
        data=subject.about_data,
        budget=BudgetRecord(
            kind=budget.kind, value=budget.value, steps=max(steps.values()), batch=request.settings.batch
        ),
        methods=titled({arm.label: about(arm, subject, steps[arm.label]) for arm in arms}),
        seeds=tuple(range(request.seeds)),
        margin=float(request.margin),
        until=until,
        options=request.options,
        search=_search_of(arms, costs),
        versions=versions(),
        hardware=hardware(),
        identity=request.identity,
        looks=(),
        predicted_seconds=total,
        measured_step_seconds=measured,
        notes=(*clocked, *notes),
    )
    count, predicted = (f"{request.seeds} seed{'s' * (request.seeds > 1)}", f"about {minutes(total)}")
    if until is not None:
        count, predicted = range_of(until)
    watch.say(
        f"{len(arms)} arms, {count}, {max(steps.values())} steps: {predicted}"
        + (f" ({minutes(costs.most(arms))} where the best rates lie far from the first)" if config.search else "")
        + "".join(f"; {label} {s:.2f} s a step" for label, s in measured.items())
        + "".join(f"\n{note}" for note in notes)
    )
    if not watch.ask(f"Run for {predicted}?"):
        raise AddendaError(f"Nothing was run. {out} was not written.")
    return Record.write_config(out, config), arms, subject


def named_by(arms: Iterable[str], data: DataRecord) -> str:
    """Return the title of a comparison that was given none."""
    return f"{', '.join(label for label in arms if label != HEAD)} on {data.name}"


def _left_out(subject: Subject) -> list[str]:
    """Return a sentence for each split that lost images which cannot be decoded."""
    lost = {split: e.skipped for split, e in subject.splits.items() if e.skipped}
    return [f"{len(names)} corrupt images of {split} were left out, {names[0]} first." for split, names in lost.items()]


def _search_of(arms: list[Arm], costs: Costs) -> SearchRecord | None:
    """Return what is recorded of the search, or None where every arm has one rate."""
    searched = {arm.label: arm.rates for arm in arms if len(arm.rates) > 1}
    if not searched:
        return None
    steps = {arm.label: costs.first(arm) for arm in arms}
    return SearchRecord(kind=KIND, rates=searched, steps=steps, further=costs.further, arms=costs.arms)


def about(arm: Arm, subject: Subject, steps: int) -> MethodRecord:
    """Return what a record says of an arm. steps: of each of its runs."""
    head = arm.label == HEAD
    entry = info(FULL if head else arm.name)
    planned = plan(subject.model, arm.method, targets=arm.targets, also_train=arm.also_train)
    return MethodRecord(
        title="Head alone" if head else entry.title + (" (all parameters)" if arm.label == FULL else ""),
        options=options_of(arm),
        hypothesis="The frozen features suffice." if head else entry.hypothesis,
        trainable=planned.trainable,
        sites=len(planned.rows),
        targets=arm.targets if isinstance(arm.targets, str) else list(arm.targets),
        rates=arm.rates,
        steps=steps,
    )


def options_of(arm: Arm) -> dict:
    """Return the options of the method and the optimizer, and settings of training that are the arm's own."""
    trained_by = {"optimizer": arm.optimizer} if arm.optimizer != "auto" else {}
    return arm.method.options() | trained_by | arm.training


def titled(methods: dict[str, MethodRecord]) -> dict[str, MethodRecord]:
    """Return the methods, titles of forms of one method with the options in which they differ."""
    titled = {}
    for label, method in methods.items():
        alike = [m.options or {} for m in methods.values() if m.title == method.title]
        differing = {k: v for k, v in (method.options or {}).items() if any(o.get(k) != v for o in alike)}
        form = ", ".join(f"{k} {v}" for k, v in differing.items()) or "defaults"
        titled[label] = replace(method, title=f"{method.title} ({form})") if len(alike) > 1 else method
    return titled
