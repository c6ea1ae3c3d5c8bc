"""`compare`: which method is worth it here? Same model, data and budget for every arm, seeds, intervals, a record.

The step time of every arm is measured first and the wall time predicted; where it would exceed `within`, test items go
first (down to 200), then rates of the search (down to three), then full fine-tuning, then the methods that do worst in
their first runs, and the record says so. An arm whose search ends without a rate is void: it has no final runs.
A run that is in the record is never repeated, so an interrupted comparison goes on with the same command.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from addenda.comparing.arm import Arm, center, parse_arm
from addenda.comparing.budget import Budget, fitted
from addenda.comparing.cluster import OnCluster, nodes, on_cluster
from addenda.comparing.costs import rivals_of
from addenda.comparing.embedded import subject_of, task_of
from addenda.comparing.entries import MARGIN, SearchRecord, TrialRecord, TrialSpec
from addenda.comparing.grouped_trials import Asked, runner_of, settled
from addenda.comparing.grow import as_judged, as_read, as_recorded, gone_on, identity_of, open_record
from addenda.comparing.more import kept, with_more
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.report import is_report, write_report
from addenda.comparing.request import Request, Watch
from addenda.comparing.result import Result
from addenda.comparing.runner import OneByOne, Runner
from addenda.comparing.search import LEAST, Chosen, Look, grid, last_steps, search, side_by_side
from addenda.comparing.start import begin
from addenda.comparing.subject import Subject, from_files
from addenda.comparing.trial import TrialSettings, control
from addenda.comparing.until import look, wanted
from addenda.comparing.workers import InProcesses, check_device, sharing_threads
from addenda.core.ask.plan import plan
from addenda.core.base import ranges
from addenda.core.base.arguments import checked, names_of, unknown_names
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.disk.lock import one_at_a_time
from addenda.core.disk.place import check_free, folder_for, no_file
from addenda.core.method.catalogue import build
from addenda.data.read import read
from addenda.models.machine import set_aside
from addenda.train import attention
from addenda.train.tracking import Trackers, Tracking, trackers_of

HEAD_RATE = 3.2e-3  # where its search starts


@with_more
@checked()
@one_at_a_time
@sharing_threads
@on_cluster
def compare(
    model: str | Path | None = None,
    data: str | Path | None = None,
    methods: str | Iterable[str] = ("lora", "miss:rank=16", "shira"),
    *,
    out: str | Path = "runs/compare",
    budget: str | Budget = "steps=40",
    seeds: int | None = None,
    until: str | None = None,
    max_minutes: float | None = None,
    more: str | Path | None = None,
    margin: float = MARGIN,
    rates: int = 5,
    search_steps: int | None = None,
    full: bool = False,
    batch: int = 8,
    targets: str | Iterable[str] | None = None,
    around: Mapping[str, float] | None = None,
    within: float | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    trust_remote_code: bool = False,
    columns: dict | None = None,
    max_length: int | None = None,
    subset: str | None = None,
    image_size: int | None = None,
    skip_corrupt: bool = False,
    items: int | None = 500,
    validation: int = 64,
    general: str | Path | None = "auto",
    report_to: Trackers = "none",
    ray: str | None = None,
    workers: int = 1,
    grouped: Asked = "auto",
    command: str = "",
    title: str | None = None,
    watch: Watch | None = None,
    subject: Subject | None = None,
) -> Result:
    """Fit methods side by side and write the record directory `out` with its report.

    model, data: a transformers folder and a data file, or the name of an embedded task (see `embedded`; docstrings if
    neither is given). methods: text forms, one an arm, such as "svft", "lora:rank=8", "lora:rank=8@lora-pro:mode=full"
    or "mosa@consistency=1", where behind an @ stands what trains it (see `arm`).
    budget: "steps=40", "seconds=120" (turned into steps once, per arm) or "parameters=500000" (each method's size
    option is set to reach it). margin: the difference in percentage points that matters: arms that differ by less count
    as equal; it is fixed before the first run. rates: how many learning rates are tried per arm, at least three, around
    the catalogue's or that of `around` for its text form, and up to four beyond them (1: no search; see `search`);
    search_steps: for how long at first (a quarter of the steps, at least 10).
    full: full fine-tuning of every parameter as a control. A model that got a new head has another control in place of
    the bare base, which cannot answer: the head alone, on frozen features. within: seconds it may take. subset: learn
    from a small part of the training data, see `data.subsets`. image_size: the side of images in pixels; skip_corrupt:
    leave out those that cannot be decoded. items: how many of the test split are judged, and half as many of the ood
    split (None: all). validation: how many of its split are looked at while training. general: a text file on which a
    causal LM's forgetting is measured ("auto": docstrings of Python's library, see `data.general`; None: it is not).
    grouped: whether runs are trained several at once, over one base: "auto" where a trial before the first run says
    that an arm gains by it (of comparisons that take minutes), True wherever the numbers come out the same, False never
    (see `grouped_trials`).
    quantize: a form that the base's linear layers are kept in for all arms, see `quantizing.quantize`.
    trust_remote_code: run code that the model's folder brings, which is never done unasked. report_to: trackers that
    are told of every loss of every run ("tensorboard", "wandb", "trackio", "mlflow", or several); their files stand in
    `out`/trackers, and a run is called as its file in the record, by arm, stage, seed, rate and steps. ray: a Ray
    cluster whose workers do the runs: HOST:PORT, "auto", or "local" for one on this machine (see `cluster`); times
    are predicted as if the runs were done here, one after another. workers: so many runs at once, on the CPU, in
    processes of their own with a share of torch's threads each, which pays where a model is too small to keep all of
    them busy (see `workers`); what other shares of the threads give differs by rounding.
    An `out` that holds a record goes on: it must be the same comparison in all that changes numbers; more seeds, more
    methods and a longer budget of steps or seconds are run, and noted (see `grow`).
    seeds: final runs of every arm (3). until="decided" adds them by itself, to 3, 5, 8, 12 and 20, until every contrast
    that matters is decided, or all of it with the next seeds is predicted to take longer than max_minutes (see
    `until`). more: a record to go on with, in its folder and by all options that it keeps; one gives seeds= or until=
    besides, and model= and data= where those are files (see `more`).
    Raises AddendaError for bad input, another comparison in `out` and another run at it, before anything is run.
    """
    methods = [methods] if isinstance(methods, str) else list(methods)
    targets = targets if targets is None or isinstance(targets, str) else tuple(targets)
    options = kept(dict(locals()))
    model, data = (None if p is None else path_of(p, name) for p, name in ((model, "model"), (data, "data")))
    out = folder_for(out, apart=() if model is None else (model, data))  # data alone names an embedded task
    record = open_record(out)
    check_free(out, {"report.html": is_report} | ({} if record else {"trials": no_file, "partial": no_file}))
    watch = replace(watch or Watch(), trackers=trackers_of(report_to))
    elsewhere = "ray" if ray is not None else "workers" if workers > 1 else None
    if (watch.trackers or elsewhere) and grouped is True:
        raise AddendaError(
            "Trackers, a cluster and workers take runs one by one: leave grouped=True out, or report_to=, ray= and "
            "workers=."
        )
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    named = [*_labels(methods), *([FULL] if full else [])]
    read_here = {"columns": columns, "max_length": max_length, "subset": subset, "image_size": image_size}
    check_rates(rates)
    if elsewhere and watch.trackers:
        raise AddendaError(
            f"report_to= is told of runs in this process; with {elsewhere}= they are elsewhere. Give one of them."
        )
    task = None if subject else task_of(model, data)
    _check(named, around or {}, columns or {}, read_here | {"skip_corrupt": skip_corrupt},
           named_here=task is None and subject is None)  # fmt: skip
    of_number, (seeds, until, max_minutes) = until is None, wanted(record, seeds, until, max_minutes, within)
    middle = {label: (around or {}).get(label) or center(label) for label in named}
    arms = [replace(parse_arm(k, None if k == FULL else targets), rates=grid(middle[k], rates)) for k in named]
    if subject is None:
        watch.say("Loading the model and the data.")
        if task is not None:
            subject = subject_of(task, model, watch.say, dtype, quantize)
        else:
            subject = from_files(
                str(model), str(data), columns=columns, dtype=dtype, quantize=quantize, max_length=max_length,
                subset=subset, image_size=image_size, skip_corrupt=skip_corrupt, items=items,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        for text in subject.splits["train"].said:
            watch.say(f"data: {text}")
    check_device(subject.model, workers)
    subject = subject.limited(items).reading(general)
    if budget.kind == "parameters":
        most = int(budget.value)
        arms = [
            a if a.label == FULL else replace(a, method=fitted(subject.model, a.method, a.targets, most)) for a in arms
        ]
    settings, heads = TrialSettings(batch=batch, validation=validation), subject.heads
    arms = [replace(a, also_train=heads) for a in arms]
    if subject.fresh:
        head = Arm(HEAD, build(FULL), tuple(f"{head}.*" for head in heads), grid(HEAD_RATE, rates))
        arms.insert(len(arms) - full, head)
    for a in arms:  # every target and shape is checked before anything is measured
        plan(subject.model, a.method, targets=a.targets, also_train=a.also_train)
    around = {k: float(v) for k, v in (around or {}).items()}
    asked = {"rates": rates, "search_steps": search_steps, "within": within, "items": items, "around": around}
    if record is not None:
        watch.say(f"Going on with {out}: {len(record.trials)} runs are done.")
        subject = as_read(as_judged(subject, record), record, general, watch)
    request = Request(
        subject=subject, arms=arms, settings=settings, budget=budget, seeds=seeds, until=until, max_minutes=max_minutes,
        of_number=of_number, margin=margin, search_steps=search_steps, within=within, options=options, command=command,
        title=title, workers=workers, identity=identity_of(
            subject, arms, settings, budget, {"seeds": seeds, "until": until, "max_minutes": max_minutes}, margin,
            asked,
        ),
    )  # fmt: skip
    if record is None:
        record, arms, subject = begin(out, request, watch)
    else:
        record = gone_on(record, request, watch)
        arms = as_recorded(arms, record)
        attention.put(subject.model, record.config.model.attention)
        subject = subject.cut(record.config.data.sizes or {})  # which time may have cut further
    with set_aside():
        _run(record, subject, arms, settings, of_number, watch, elsewhere, workers, grouped)
    record = Result.read(out)
    report = write_report(out)
    watch.say(f"Report: {report}")
    return record


def check_rates(rates: int) -> None:
    """Raise AddendaError for a number of rates that no search can be of."""
    if 1 < rates < LEAST:
        raise AddendaError(
            f"rates is {rates}; at least {LEAST} are searched, so that the best can lie between two others (or 1, for "
            "no search)."
        )


def _check(named: list[str], around: Mapping, columns: dict, read_here: dict, named_here: bool) -> None:
    """Raise AddendaError for options that nothing would read, before anything is loaded."""
    if unknown := [k for k in around if k not in named]:
        raise AddendaError(unknown_names(unknown, named, "around="))
    if problems := [p for k, rate in around.items() for p in ranges.problems({"rate": rate})]:
        raise AddendaError(f"around= gives the middle of each search: {'; '.join(problems)}.")
    asked = [k for k, v in read_here.items() if v]
    if asked and not named_here:
        raise AddendaError(f"{asked[0]}= is for data that is read here, and none is named: give model= and data=.")
    known = names_of(read, without=("task", "split"))
    if unknown := [k for k in columns if k not in known]:
        raise AddendaError(unknown_names(unknown, known, "columns="))


def _labels(methods: Iterable[str]) -> list[str]:
    specs = [s.strip() for s in methods if s.strip()]
    if not specs:
        raise AddendaError("There is nothing to compare; give at least one method, e.g. --methods lora,shira.")
    if len(set(specs)) < len(specs):
        raise AddendaError(f"A method is named twice: {', '.join(specs)}. Give different options to compare two forms.")
    return specs


def _run(
    record: Record,
    subject: Subject,
    arms: list[Arm],
    settings: TrialSettings,
    of_number: bool,
    watch: Watch,
    elsewhere: str | None,
    workers: int,
    grouped: Asked,
) -> None:
    """Judge the controls, then run what the record lacks, one after another or many at once.

    elsewhere: "ray" on the cluster that this process is connected to, "workers" in processes that it begins.
    """
    known = record.config
    controls = {} if subject.fresh else {"base": subject.tested, **subject.controls}
    for label, splits in controls.items():
        if record.find(label, "control") is None:
            watch.trial(label, "control", None, None)
            record = record.write_trial(control(subject, label, splits))
            watch.done(record)

    folder = record.path / "partial"
    never = "trackers follow one run at a time" if watch.trackers else "workers take runs one by one"
    never = never if watch.trackers or elsewhere else None
    record = settled(record, subject, arms, settings, grouped, watch.say, never)
    alone = OneByOne(
        subject, arms, settings, folder, known.measured_step_seconds or {}, watch.trial,
        partial(Tracking.under, record.path, watch.trackers),
    )  # fmt: skip
    if elsewhere == "ray":
        there = OnCluster(subject, arms, settings, folder, known.model.attention, watch.trial)
        _runs(noted(record, nodes()), there, arms, of_number, watch)
    elif elsewhere:
        with InProcesses(alone, workers) as beside:
            _runs(noted(record, beside.note()), beside, arms, of_number, watch)
    else:
        _runs(record, runner_of(record, alone, grouped if never is None else False), arms, of_number, watch)


def noted(record: Record, note: str) -> Record:
    """Return the record with a sentence in its notes, once."""
    there = record.config.notes
    return record if note in there else record.changed(replace(record.config, notes=(*there, note)))


def _runs(record: Record, runner: Runner, arms: list[Arm], of_number: bool, watch: Watch) -> None:
    """Execute every run that the record lacks, searches first, then seed by seed so that early seeds are complete."""

    def run(specs: Sequence[TrialSpec]) -> list[TrialRecord]:
        nonlocal record
        found = {s: record.find(s.method, s.stage, s.seed, s.rate, s.steps) for s in specs}
        for spec, made in runner([s for s in found if found[s] is None]):
            record = record.write_trial(made)
            found[spec] = made
            runner.recorded(spec)
            watch.done(record)
        return [made for s in specs if (made := found[s]) is not None]

    best = _searched(arms, record, run)
    record = _voided(record, {label: found.why for label, found in best.items() if found.rate is None})
    for label, method in record.config.methods.items():
        if method.void is not None:
            watch.say(f"{label} has no final runs: {method.void}.")
    final = {label: method.steps for label, method in record.config.methods.items() if method.steps is not None}
    rates = {label: found.rate for label, found in best.items() if found.rate is not None}
    if not rates:
        void = "; ".join(f"{label}: {found.why}" for label, found in best.items())
        raise AddendaError(f"No arm has a rate to run at, so there is nothing to compare. {void}. Kept: {record.path}.")
    seeds: tuple[int, ...] = ()
    while seeds != record.config.seeds:  # which grow, look by look, until the comparison is decided
        seeds = record.config.seeds
        run([TrialSpec(label, "final", seed, rate, final[label]) for seed in seeds for label, rate in rates.items()])
        record = look(record, of_number, watch.say)
    with suppress(OSError):  # another's file in it keeps it
        runner.folder.rmdir()


def _searched(
    arms: list[Arm], record: Record, run: Callable[[Sequence[TrialSpec]], list[TrialRecord]]
) -> dict[str, Chosen]:
    """Return the rate of every arm. One that has final runs keeps theirs, one that is void stays so."""
    how, found, going = record.config.search or SearchRecord(), {}, {}
    for arm in arms:
        method, final = record.config.methods[arm.label], record.trials_of(arm.label, "final")
        if final:
            found[arm.label] = Chosen(final[0].rate)
        elif method.void is not None:
            found[arm.label] = Chosen(None, method.void)
        else:
            first = how.first_steps(arm.label)
            going[arm.label] = search(arm.rates, first, last_steps(first, method.steps or first), how.further or 0)

    def runs(asked: list[tuple[str, Look]]) -> list[TrialRecord]:
        return run([TrialSpec(label, "search", look.seed, look.rate, look.steps) for label, look in asked])

    found |= side_by_side(going, runs, how.arms, [k for k in rivals_of(arms) if k in going])
    return {arm.label: found[arm.label] for arm in arms}


def _voided(record: Record, void: Mapping[str, str | None]) -> Record:
    """Return the record with what its searches ended without, written down before any final run."""
    there = record.config.methods
    methods = {label: replace(m, void=void.get(label)) for label, m in there.items()}
    return record if methods == there else record.changed(replace(record.config, methods=methods))
