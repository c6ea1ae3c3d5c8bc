"""`addenda compare`: methods side by side on one model, data and budget; `addenda report` draws a record again."""

import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from addenda.cli import run_file
from addenda.cli.common import (
    Answer,
    DataFile,
    Dtype,
    Image,
    ImageSize,
    Label,
    LabelKind,
    MaxLength,
    Model,
    Quantize,
    Question,
    ReportTo,
    SkipCorrupt,
    Subset,
    Targets,
    Text,
    Trust,
    columns_of,
    draw,
    listed,
    model_or_default,
    refuse,
    refuse_unread,
    say,
    tell,
)
from addenda.comparing.embedded import DOCSTRINGS, ENCODER, PLAN, VALIDATION, middles, task_of, threads_of, workers_of
from addenda.comparing.entries import MARGIN
from addenda.train.settings import DOCS
from addenda.train.tracking import trackers_of

METHODS = "lora,miss:rank=16,shira"
WITH_MORE = (
    "more", "model", "data", "seeds", "until", "max_minutes", "general", "trust_remote_code", "report_to", "ray",
    "workers", "yes",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command()(compare)
    app.command()(report)


def compare(
    model: Model = None,
    data: DataFile = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Arms, by commas; the options of one by semicolons: 'lora:rank=2;alpha=4'. Behind an @ what trains "
            "it: lora@lora-pro.",
        ),
    ] = METHODS,
    budget: Annotated[
        str, typer.Option("--budget", help="steps=40, seconds=120 or parameters=500000, the same for every arm.")
    ] = "steps=40",
    seeds: Annotated[int | None, typer.Option("--seeds", help="Final runs of every arm. Default: 3.")] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="decided: add seeds (3, 5, 8, 12, 20) until what matters is decided.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="With --until: no more seeds where that would take longer.")
    ] = None,
    more: Annotated[
        Path | None,
        typer.Option("--more", help="Go on with this record, by the options it keeps; with --seeds or --until."),
    ] = None,
    margin: Annotated[
        float, typer.Option("--margin", help="Percentage points that matter; arms that differ by less count as equal.")
    ] = MARGIN,
    rates: Annotated[
        int, typer.Option("--rates", help="Learning rates tried for every arm, 3 or more; 1: no search.")
    ] = 5,
    search_steps: Annotated[
        int | None, typer.Option("--search-steps", help="Steps of a first look at a rate. Default: a quarter.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning of all parameters as a control.")] = False,
    batch: Annotated[int, typer.Option("--batch", help=DOCS["batch"])] = 8,
    targets: Targets = None,
    within: Annotated[
        float | None,
        typer.Option("--within", help="Seconds it may take: items, rates, then arms are dropped to fit, by the clock."),
    ] = None,
    items: Annotated[int, typer.Option("--items", help="Test examples judged; 0: all. Half as many of ood.")] = 500,
    general: Annotated[
        str, typer.Option("--general", help="Text to measure forgetting on: a file, auto (Python's docstrings), none.")
    ] = "auto",
    grouped: Annotated[
        bool | None,
        typer.Option("--grouped/--no-grouped", help="Train several runs at once. Default: where a trial says it pays."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Record directory; an interrupted one goes on.")] = Path(
        "runs/compare"
    ),
    ray: Annotated[
        str | None, typer.Option("--ray", help="Run on a Ray cluster: HOST:PORT, auto, or local for one here.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Runs at once, in processes of their own. Default: 1; splade-tiny: one a core."),
    ] = None,
    question: Question = None,
    answer: Answer = None,
    text: Text = None,
    label: Label = None,
    label_kind: LabelKind = None,
    image: Image = None,
    subset: Subset = None,
    image_size: ImageSize = None,
    skip_corrupt: SkipCorrupt = False,
    max_length: MaxLength = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    trust_remote_code: Trust = False,
    report_to: ReportTo = "none",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the long part.")] = False,
) -> None:
    """Which method is worth it here? Same model, data and budget, several seeds, intervals, a report.

    Without --model and --data: a small encoder on the docstrings of installed libraries, with the methods, steps,
    rates, seeds, batch and items of `addenda demo` unless given. --data sort-numbers: SmolLM2-135M sorts numbers.
    """
    given = dict(locals())
    if more is not None:
        said = run_file.said(compare, given)
        refuse([k for k in given if k in said and k not in WITH_MORE], "with --more: the record has its own.")
        trackers_of(report_to)
        _go_on(more, given)
        return
    if rates == 1:
        refuse_unread(compare, given, ("search_steps",), "with --rates 1: no rate is searched for.")
    from addenda.comparing.arm import parse_arm

    rest, threads = {}, None
    if on_docstrings := task_of(model, data) == DOCSTRINGS:
        asked = run_file.said(compare, given)
        asked |= ({"seeds"} if until else set()) | ({"search_steps"} if asked & {"budget", "rates"} else set())
        given |= {k: v for k, v in PLAN.items() if k not in asked}
        methods, budget, search_steps, seeds = (given[k] for k in ("methods", "budget", "search_steps", "seeds"))
        rates, batch, items, dtype, grouped = (given[k] for k in ("rates", "batch", "items", "dtype", "grouped"))
        threads = threads_of(model)
    chosen = _arms(methods)
    if on_docstrings:
        rest = {"validation": VALIDATION, "around": middles(chosen)}
    for spec in chosen:
        parse_arm(spec)  # a mistake here should not cost the seconds that transformers takes
    trackers_of(report_to)
    run_file.check_place(out, compare)
    from addenda.comparing.live import Board
    from addenda.comparing.report import summary
    from addenda.comparing.run import compare as run
    from addenda.core.base.threads import at_most

    at_once = at_once_of(given, threads)  # before torch has fewer threads
    with Board() as board, _kept(out), at_most(threads):
        record = run(
            model and model_or_default(model), data, chosen, out=out, budget=budget, seeds=seeds, until=until,
            max_minutes=max_minutes, margin=margin, rates=rates, search_steps=search_steps, full=full, batch=batch,
            within=within, items=items or None, targets=listed(targets) if targets else None, dtype=dtype,
            general=None if general == "none" else general, report_to=report_to,
            grouped="auto" if grouped is None else grouped,
            quantize=quantize, max_length=max_length, subset=subset, image_size=image_size, skip_corrupt=skip_corrupt,
            columns=columns_of(question=question, answer=answer, text=text, label=label, image=image)
            | columns_of(label_kind=label_kind), trust_remote_code=trust_remote_code, ray=ray,
            workers=at_once, command=shlex.join(["addenda", *sys.argv[1:]]), watch=board.watch(asking(yes)),
            **rest,
        )  # fmt: skip
    run_file.write(out, compare, given, {} if until else {"seeds": len(record.config.seeds)})
    draw(summary(record))


def _arms(methods: str) -> list[str]:
    """Return the text form of each arm in --methods. Raises AddendaError for an option that a comma cut off."""
    from addenda.core.base.errors import AddendaError

    parts = [part.strip() for part in methods.split(",") if part.strip()]
    if cut := [p for p in parts if "=" in p.partition("@")[0] and ":" not in p.partition("=")[0]]:
        raise AddendaError(
            f"--methods has {cut[0]!r} in the place of a method: commas stand between methods, and semicolons between "
            "the options of one, as in 'lora:rank=2;alpha=4,shira'."
        )
    return [part.replace(";", ",") for part in parts]


def _go_on(folder: Path, given: dict[str, Any]) -> None:
    """Go on with a record. Where its model and data are, its run file or its command says, unless it is given."""
    from addenda.comparing.live import Board
    from addenda.comparing.more import said_in
    from addenda.comparing.record import Record
    from addenda.comparing.report import summary
    from addenda.comparing.run import compare as run
    from addenda.comparing.until import NO_MORE
    from addenda.core.base.threads import at_most

    mine = run_file.is_of(folder, compare)  # that of another command has nothing to say here, and stays
    left = run_file.read(folder / run_file.NAME, compare, "compare") if mine else {}
    about = Record.read(folder).config
    where = said_in(about.command) | left
    model, data = (given[k] or (k in where and Path(where[k])) or None for k in ("model", "data"))
    text = given["general"] if given["general"] != "auto" else where.get("general", "auto")
    threads = threads_of(ENCODER) if about.model.name == ENCODER else None
    at_once = at_once_of(given, threads)  # before torch has fewer threads
    with Board() as board, _kept(folder), at_most(threads):
        record = run(
            model and model_or_default(model), data, more=folder, seeds=given["seeds"], until=given["until"],
            max_minutes=given["max_minutes"], trust_remote_code=given["trust_remote_code"],
            general=None if text == "none" else text, report_to=given["report_to"], ray=given["ray"],
            workers=at_once, watch=board.watch(asking(given["yes"])),
        )  # fmt: skip
    if left:
        until, default = record.config.until, {n: p.default for n, p in inspect.signature(compare).parameters.items()}
        by_number = until is None or given["seeds"] is not None or until.stopped == NO_MORE
        now = {"seeds": len(record.config.seeds)} if by_number else {
            "until": "decided", "max_minutes": until.max_minutes}  # fmt: skip
        past = {k: v for k, v in left.items() if k not in ("seeds", "until", "max_minutes")}
        run_file.write(folder, compare, default | past | now)
    draw(summary(record))


def at_once_of(given: Mapping[str, Any], threads: int | None) -> int:
    """Return how many runs are made at once: as many as were asked for, else by how many threads one of them has."""
    if given["workers"] is not None or threads != 1:
        return given["workers"] or 1
    taken = given["ray"] is not None or given["report_to"] != "none" or given["grouped"] is True
    return 1 if taken else workers_of(threads)


def asking(yes: bool) -> Callable[[str], bool]:
    """Return what asks before the long part."""
    from addenda.comparing.live import terminal

    def ask(text: str) -> bool:
        if yes:
            return True
        if not terminal():
            say("Nobody is there to answer; --yes answers beforehand.")
            return False
        return typer.confirm(text, default=True, err=True)

    return ask


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Say what is in the record, where the `with` block is interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = len(list((out / "trials").glob("*.json"))) if (out / "config.json").is_file() else None
        error.add_note(
            "Nothing is kept yet: the record was not begun." if done is None else
            f"Kept: {done} finished runs in {out}. The same command goes on there."
        )  # fmt: skip
        raise


def report(
    record: Annotated[Path, typer.Argument(help="A record directory.")],
) -> None:
    """Draw the report of a record again, and print its table."""
    from addenda.comparing.record import Record
    from addenda.comparing.report import summary, write_report

    path = write_report(record)
    draw(summary(Record.read(record)))
    tell(f"Report: {path}")
