"""Runs of a comparison at once, over one frozen base: which arms gain by that, and a runner that does it.

Before the first run each arm is tried, alone and as a group: whether its numbers come out the same, and how long a step
takes. The answer is written into the record and holds for all of its runs, so that none follows the clock later on. A
run of a group differs from the same run alone by rounding (float32: losses within 1e-5 over the first 20 steps); its
record says how many ran at once. Why an arm's runs go one after another is written down too, also where nothing was
tried: of a short comparison, of long steps, of full fine-tuning. Where any arm is grouped, times and memory of every
arm's runs are those of the arm alone, as it was tried, so that like is compared with like.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch

from addenda.comparing.arm import Arm
from addenda.comparing.entries import Grouping, TrialRecord, TrialSpec
from addenda.comparing.record import FULL, Record
from addenda.comparing.runner import CHECKPOINT_SECONDS, OneByOne, Runner
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings, attached, concluded, goes_on, how, looked_at
from addenda.comparing.words import about
from addenda.core.adapter.switch import switch
from addenda.core.base.errors import AddendaError
from addenda.models.machine import device_of, hardware, resident
from addenda.train import checkpoint
from addenda.train.fit import FitResult, fit
from addenda.train.grouped import fit_grouped
from addenda.train.slot import ALONE, Run
from addenda.train.trainer import DivergedError

Asked = Literal["auto"] | bool

MOST = 9  # runs at once
QUICK = 0.25  # seconds of a step from which on "auto" tries nothing: a forward of it leaves no processor idle
WORTH = 120.0  # predicted seconds of a comparison below which "auto" tries nothing: a trial takes seconds itself
PAYS = 1.1  # how much faster a group must be
TRIED = 4  # steps of each trial
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the losses of those steps, relative; else COARSE
COARSE = 0.05


def settled(
    record: Record, subject: Subject, arms: Sequence[Arm], settings: TrialSettings, asked: Asked,
    say: Callable[[str], None], never: str | None = None,
) -> Record:  # fmt: skip
    """Return the record with the answer for every arm, which is measured only where no run has begun.

    asked: "auto" groups where a trial says that it pays, True wherever the numbers come out the same, False nowhere.
    never: why none is grouped, whatever was asked.
    """
    known, config = record.config.grouped, record.config
    new = [arm for arm in arms if arm.label not in (known or {})]
    begun = bool(record.trials_of(stage="search") + record.trials_of(stage="final"))
    if known is None and begun:
        return record
    seconds = config.predicted_seconds or 0.0
    if begun and not any(made.pays for made in (known or {}).values()):
        never = "the runs before it went one after another"
    elif never is None and known is None and asked == "auto" and seconds < WORTH:
        never = (
            f"all runs together are predicted to take less than {about(WORTH)}, and trying a group takes seconds too"
        )
    if never is not None and new:
        alone = {arm.label: Grouping(pays=False, why=never) for arm in new}
        return record.changed(replace(config, grouped={**(known or {}), **alone}))
    if asked is False:
        return record
    found = dict(known or {})
    for arm in new:
        count = min(MOST, max(len(config.seeds), len(arm.rates)))
        pace = (config.measured_step_seconds or {}).get(arm.label, 0.0)
        found[arm.label] = made = tried(subject, arm, settings, count, asked, pace)
        if made.pays:
            say(f"{arm.label}: up to {made.most} runs at once, {made.ratio:.1f} x as fast as one after another")
        else:
            say(f"{arm.label}: one run after another; {made.why}")
    if any(made.pays for made in found.values()):
        for arm in (a for a in new if found[a.label].step_seconds is None):
            found[arm.label] = _with_costs(found[arm.label], subject, arm, settings)
    return record if not new else record.changed(replace(config, grouped=found))


def tried(subject: Subject, arm: Arm, settings: TrialSettings, count: int, asked: Asked, pace: float = 0.0) -> Grouping:
    """Train a few steps of an arm alone and as a group of `count`, twice in turn; return what that says."""
    reason = _alone(arm, count)
    if reason is None and asked == "auto" and pace > QUICK:
        reason = f"a step takes {pace:.2f} s, so that one run alone keeps the processor busy"
    if reason is not None:
        return Grouping(pays=False, why=reason)
    specs = [_spec(arm, seed) for seed in range(count)]
    alone, together = [], []
    try:
        for _ in range(2):
            alone.append(_tried_alone(subject, arm, settings))
            with ExitStack() as stack:
                together.append(trained_together(subject, [(arm, spec) for spec in specs], settings, stack)[1])
    except AddendaError as error:
        return Grouping(pays=False, why=str(error))
    dtype = next(p.dtype for p in subject.model.parameters() if p.dim() > 1)
    first = together[0][0]
    want = [loss for _, loss in alone[0].losses]
    got = [] if isinstance(first, DivergedError) else [loss for _, loss in first.losses]
    close = CLOSE.get(dtype, COARSE)
    if len(got) != len(want) or any(abs(a - b) > close * abs(b) for a, b in zip(got, want, strict=True)):
        return Grouping(pays=False, why=f"its losses are {_said(got)} in a group, and {_said(want)} alone")
    fast = max(sum(r.tokens for r in made) / sum(r.seconds for r in made) for made in map(_whole, together))
    costs = _costs(alone)
    peak = costs["peak_bytes"]
    most = MOST if not peak else max(1, min(MOST, int((hardware()["memory"] or 2 * MOST * peak) / 2 / peak)))
    ratio = fast / costs["pace"]
    pays = most > 1 and (asked is True or ratio >= PAYS)
    return Grouping(
        pays=pays, most=most, runs=count, ratio=ratio, **costs,
        why=None if pays else f"{count} runs at once are {ratio:.2f} x as fast as one after another",
    )  # fmt: skip


def _tried_alone(subject: Subject, arm: Arm, settings: TrialSettings) -> FitResult:
    """Train a few steps of an arm alone, without a look at other data."""
    spec = _spec(arm, 0)
    with attached(subject, arm, settings, spec.seed, batches=1) as adapter:
        return fit(subject.model, adapter, subject.splits["train"], **_options(arm, settings, spec))


def _spec(arm: Arm, seed: int) -> TrialSpec:
    return TrialSpec(arm.label, "search", seed, arm.rates[len(arm.rates) // 2], TRIED)


def _costs(alone: Sequence[FitResult]) -> dict[str, Any]:
    """Return what an arm takes alone, of the better of its trials."""
    peaks = [r.peak_memory for r in alone if r.peak_memory is not None]
    return {
        "step_seconds": min(r.step_seconds for r in alone), "pace": max(r.tokens_per_second for r in alone),
        "peak_bytes": min(peaks, default=None),
    }  # fmt: skip


def _with_costs(made: Grouping, subject: Subject, arm: Arm, settings: TrialSettings) -> Grouping:
    """Return the answer for an arm that is not grouped with what it takes, tried as the grouped ones were."""
    try:
        return replace(made, **_costs([_tried_alone(subject, arm, settings) for _ in range(2)]))
    except AddendaError:  # its runs will say why
        return made


def _alone(arm: Arm, count: int) -> str | None:
    """Return why an arm's runs are never grouped, or None."""
    if arm.label == FULL:
        return "every parameter is trained, so that no base is shared"
    if own := [k for k in ALONE if arm.training.get(k)]:
        return f"{', '.join(own)}: a run with that is trained alone"
    return "there is one run of it" if count < 2 else None


def _options(arm: Arm, settings: TrialSettings, spec: TrialSpec) -> dict:
    return {k: v for k, v in how(arm, settings, spec).items() if k != "eval_every"}


def _whole(made: Sequence[FitResult | DivergedError]) -> list[FitResult]:
    return [r for r in made if isinstance(r, FitResult)]


def _said(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.6g}" for loss in losses) or "none"


def trained_together(
    subject: Subject,
    wanted: Sequence[tuple[Arm, TrialSpec]],
    settings: TrialSettings,
    stack: ExitStack,
    places: Sequence[Path | None] = (),
    watch: Callable | None = None,
) -> tuple[list, list[FitResult | DivergedError]]:
    """Attach and train a group; return its adapters, which `stack` takes off, and what came of them."""
    floor, runs = resident(device_of(subject.model)), []
    for i, (arm, spec) in enumerate(wanted):
        torch.manual_seed(spec.seed)  # as a run alone is attached
        adapter = stack.enter_context(attached(subject, arm, settings, spec.seed, name=f"trial{i}"))
        place = places[i] if places else None
        options = how(arm, settings, spec) if places else _options(arm, settings, spec)
        if place is not None:
            options["save_every"] = max(1, spec.steps // 10)
        runs.append(Run(adapter, options, watch if i == 0 else None, place))
    eval = looked_at(subject, settings) if places else None
    made = fit_grouped(subject.model, runs, subject.splits["train"], eval=eval, memory_floor=floor)
    return [run.adapter for run in runs], made


@dataclass(frozen=True)
class GroupedTrials:
    """A runner that trains runs of equal length at once, of arms that gain by it; others one after another."""

    alone: OneByOne
    chosen: Mapping[str, Grouping]
    folder: Path

    def __call__(self, specs: Sequence[TrialSpec]) -> Iterator[tuple[TrialSpec, TrialRecord]]:
        for group in formed(specs, self.chosen):
            for spec, run in self.alone(group) if len(group) == 1 else self._group(group):
                yield spec, self._costed(run)

    def recorded(self, spec: TrialSpec) -> None:
        self.alone.recorded(spec)

    def _group(self, specs: Sequence[TrialSpec]) -> Iterator[tuple[TrialSpec, TrialRecord]]:
        own, started = self.alone, time.perf_counter()
        by_label = {arm.label: arm for arm in own.arms}
        seconds = sum((self.chosen[s.method].step_seconds or 0.0) * s.steps for s in specs)
        long = seconds > CHECKPOINT_SECONDS
        places = [own.folder / spec.name if long else None for spec in specs]
        for place in places:
            if place is not None and not goes_on(place):
                checkpoint.drop(place)
        first = specs[0]
        with ExitStack() as stack:
            wanted = [(by_label[s.method], s) for s in specs]
            watch = own.watch(first.method, first.stage, first.seed, first.rate)
            try:
                adapters, made = trained_together(own.subject, wanted, own.settings, stack, places, watch)
            except AddendaError:  # one of them, such as of values that no checkpoint can hold; alone it says so itself
                adapters, made = [], []
            share = (time.perf_counter() - started) / len(specs)
            for spec, adapter, result in zip(specs, adapters, made, strict=bool(made)):
                switch(own.subject.model, adapter.name)
                run = concluded(own.subject, adapter, spec, result, share)
                yield spec, replace(run, grouped=len(specs))
        if not made:
            for place in places:
                if place is not None:
                    checkpoint.drop(place)
            yield from own(specs)

    def _costed(self, run: TrialRecord) -> TrialRecord:
        """Return a run with the times and memory of its arm alone, as they were tried."""
        tried = self.chosen.get(run.method)
        if tried is None or tried.step_seconds is None or run.status != "ok":
            return run
        return replace(
            run, step_seconds=tried.step_seconds, peak_bytes=tried.peak_bytes,
            tokens_per_second=tried.pace if run.tokens_per_second is not None else None,
            images_per_second=tried.pace if run.images_per_second is not None else None,
        )  # fmt: skip


def formed(specs: Sequence[TrialSpec], chosen: Mapping[str, Grouping]) -> list[list[TrialSpec]]:
    """Return the runs in groups of equal steps, of arms that gain by it, near each other in size; others alone.

    Runs of one arm are neighbours in a group, since their products run batched.
    """
    by_steps: dict[int, list[TrialSpec]] = {}
    groups: list[list[TrialSpec]] = []
    for spec in specs:
        grouping = chosen.get(spec.method)
        if grouping is None or not grouping.pays:
            groups.append([spec])
        else:
            by_steps.setdefault(spec.steps, []).append(spec)
    for together in by_steps.values():
        most = min(chosen[s.method].most or 1 for s in together)
        pieces = ceil(len(together) / most)
        ordered = sorted(together, key=lambda s: list(chosen).index(s.method))
        cuts = [round(i * len(ordered) / pieces) for i in range(pieces + 1)]
        groups += [ordered[a:b] for a, b in pairwise(cuts)]
    return groups


def runner_of(record: Record, alone: OneByOne, asked: Asked) -> Runner:
    """Return what runs the trials of a record: groups where it says so, and where that is not forbidden now."""
    chosen = record.config.grouped or {}
    return (
        GroupedTrials(alone, chosen, alone.folder)
        if asked is not False and any(g.pays for g in chosen.values())
        else alone
    )
