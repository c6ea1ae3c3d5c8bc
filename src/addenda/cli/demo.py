"""`addenda demo`: a method is chosen by a comparison, trained and shown; `addenda setup-demo`: the embedded models."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from addenda.cli.common import draw, say, short, tell
from addenda.core.base.errors import AddendaError

if TYPE_CHECKING:
    from addenda.comparing.choose import Choice
    from addenda.comparing.record import Record
    from addenda.train.tune import TuneResult

# Of SmolLM2-135M, about two minutes on two cores: where the processor multiplies bfloat16 fast, and where it does not.
# Its class decides, not the clock, so that equal machines make equal plans.
TUNING: dict[str, Any] = {"bfloat16": {"steps": 120, "batch": 4}, "float32": {"steps": 100, "batch": 4}}
QUESTIONS = 8  # of the test split
NAME, COST = "demo.json", "size"  # the same in every run, as memory and time are not


def register(app: typer.Typer) -> None:
    app.command()(demo)
    app.command("setup-demo")(setup_demo)


def setup_demo(
    vision: Annotated[bool, typer.Option("--vision", help="The vision model instead: DINOv2-small (90 MB).")] = False,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="An encoder of texts instead: splade-tiny (17 MB), minilm (84 MB), e5 (91 MB)."),
    ] = None,
) -> None:
    """Fetch and convert the embedded models (110 MB, once), so that the other commands need no --model."""
    from addenda.models.encoders import ENCODERS, encoder_named

    if encoder is not None:
        if vision:
            raise AddendaError("--vision and --encoder name one model each; run the command once for each.")
        tell(encoder_named(encoder).setup(say))
    elif vision:
        from addenda.models.vision import DINOV2

        tell(DINOV2.setup(say))
    else:
        from addenda.comparing.embedded import ENCODER
        from addenda.models.embedded import setup_demo as setup

        tell(ENCODERS[ENCODER].setup(say))
        tell(setup(say))


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for record, report and adapter; a stopped run goes on there.")
    ] = Path("runs/demo"),
) -> None:
    """Compare four methods on a small encoder, take the recommended one, and train it on SmolLM2-135M.

    Ten minutes on two cores, with five seeds and a search for the rate of each method; the same plan on every machine.
    """
    from addenda.core.disk.place import check_free, folder_for

    check_free(folder_for(out), {NAME: _is_ours})
    seconds: dict[str, float] = {}
    with _stage("fetch", "the models and the docstrings, once", seconds):
        _fetch()
    with _stage("compare", "four methods on a small encoder: which library is a docstring from?", seconds):
        record = _compare(out)
    with _stage("choose", f"the method of the least {COST} of those that are not worse than the best", seconds):
        choice = _choose(record)
    tell(choice.why)
    if choice.arm is None:
        tell(f"Report: {out / 'report.html'}")
        return
    with _stage("tune", f"{choice.title} on SmolLM2-135M, to sort numbers", seconds):
        made = _tune(choice.arm, out / "adapter")
    with _stage("answers", f"{QUESTIONS} questions of the test split, without the adapter and with it", seconds):
        answers = _answers(made)
    _show(answers)
    tell(f"{', '.join(f'{name} {taken:.0f} s' for name, taken in seconds.items())}.")
    tell(f"Report: {out / 'report.html'}\nAdapter: {made.path}")
    _keep(out / NAME, choice, made, answers, seconds)


@contextmanager
def _stage(name: str, what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say that a stage begins and what it took, in a `with` block."""
    say(f"[{name}] {what}")
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    say(f"[{name}] {seconds[name]:.0f} s")


def _fetch() -> None:
    from addenda.comparing.embedded import ENCODER
    from addenda.data.docstrings import docstrings
    from addenda.models.embedded import setup_demo as setup
    from addenda.models.encoders import ENCODERS

    ENCODERS[ENCODER].setup(say)
    setup(say)
    docstrings(tell=say)


def _compare(out: Path) -> "Record":
    from addenda.comparing.embedded import PLAN, VALIDATION, middles, threads_of, workers_of
    from addenda.comparing.live import Board
    from addenda.comparing.report import summary
    from addenda.comparing.run import compare
    from addenda.core.base.threads import at_most

    methods = PLAN["methods"].split(",")
    plan = PLAN | {"methods": methods, "items": PLAN["items"] or None, "validation": VALIDATION}
    threads = threads_of(None)
    plan["workers"] = workers_of(threads)  # which changes no number
    with Board() as board, at_most(threads):
        record = compare(
            out=out, command="addenda demo", around=middles(methods), watch=board.watch(lambda question: True), **plan
        )
    draw(summary(record))
    return record


def _choose(record: "Record") -> "Choice":
    from addenda.comparing.choose import choose

    return choose(record, COST)


def _tune(arm: str, out: Path) -> "TuneResult":
    from addenda.data.read import of_task
    from addenda.data.task import embedded_task
    from addenda.models.embedded import model_folder
    from addenda.models.machine import pick_device, pick_dtype
    from addenda.train.tune import tune

    dtype = str(pick_dtype("auto", pick_device())[0]).removeprefix("torch.")
    train = of_task(embedded_task(), "train")  # alone: nothing is judged but the questions that follow
    return tune(model_folder(say), train, arm, out=out, dtype=dtype, **TUNING[dtype])


def _answers(made: "TuneResult") -> list[dict[str, str]]:
    """Return what the model writes to a few questions, without the adapter and with it."""
    from addenda.core.adapter.switch import switch
    from addenda.data.examples import Chat
    from addenda.data.task import SYSTEM, embedded_task
    from addenda.train.generate import generate

    model: Any = made.model
    examples = embedded_task().splits["test"][:QUESTIONS]
    prompts = [Chat((("system", SYSTEM), ("user", e.question), ("assistant", ""))) for e in examples]
    written = {}
    for when, name in (("before", None), ("after", "default")):
        switch(model, name)
        written[when] = generate(model, made.tokenizer, prompts, max_new_tokens=32)
    return [
        {"question": e.question, "answer": e.answer, "before": b.strip(), "after": a.strip()}
        for e, b, a in zip(examples, written["before"], written["after"], strict=True)
    ]


def _show(answers: list[dict[str, str]]) -> None:
    """Print the questions with the answers before and after, wrong ones marked."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="SmolLM2-135M, without the adapter and with it", title_justify="left")
    for column in ("question", "before", "after", "right answer"):
        table.add_column(column)
    for row in answers:
        found = [f"{'✓' if row[k] == row['answer'] else '✗'} {short(row[k])}" for k in ("before", "after")]
        table.add_row(*map(Text, (row["question"], *found, row["answer"])))
    right = {k: sum(row[k] == row["answer"] for row in answers) for k in ("before", "after")}
    draw(table)
    tell(f"Right before: {right['before']} of {len(answers)}; after: {right['after']}.")


def _keep(
    path: Path, choice: "Choice", made: "TuneResult", answers: list[dict[str, str]], seconds: dict[str, float]
) -> None:
    """Write what was chosen, trained and answered beside the record."""
    from addenda.core.disk.atomic import readable, write_atomically
    from addenda.models.machine import hardware, versions

    kept = {
        "demo": 1,
        "choice": choice.as_json(),
        "tuned": {"steps": made.steps, "trainable": made.adapter.trainable},
        "answers": answers,
        "seconds": {name: round(taken, 1) for name, taken in seconds.items()},
        "hardware": hardware(),
        "versions": versions(),
    }
    write_atomically(path, (readable(kept) + "\n").encode())


def _is_ours(path: Path) -> bool:
    """Return whether a file is what an earlier demo has written."""
    from addenda.core.disk.access import read_json

    found = read_json(path)
    return isinstance(found, dict) and "demo" in found and "answers" in found
