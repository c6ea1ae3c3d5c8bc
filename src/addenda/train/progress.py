"""Progress of a run: a bar on a terminal, else plain lines that a log can hold."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from addenda.core.base.visible import visible
from addenda.train.fit import Event, Progress


@contextmanager
def shown(title: str = "tune", stream=None) -> Iterator[Progress]:
    """Show progress on stderr: yields a progress function for `fit`."""
    stream, title = stream or sys.stderr, visible(title)
    if not stream.isatty():
        yield lambda event: _line(event, title, stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[says]}"),
    )
    with Bar(*columns, TimeRemainingColumn(), console=Console(file=stream)) as bar:
        task = bar.add_task(title, total=None, says="")

        def tell(event: Event) -> None:
            if event.evaluation:
                bar.console.print(f"step {event.step}: {judged(event.evaluation)}")
            says = f"loss {event.loss:.4f}, {event.tokens_per_second:,.0f} {event.unit}/s"
            bar.update(task, total=event.steps, completed=event.step, says=says)

        yield tell


def understood(said: Iterable[str], stream=None) -> None:
    """Print what was understood of the data, a line each, on stderr."""
    for text in said:
        print(f"data: {visible(text)}", file=stream or sys.stderr, flush=True)


def announce(text: str, stream=None) -> None:
    """Print a line about what a run does now, before it has steps to tell of."""
    print(f"tune: {visible(text)}", file=stream or sys.stderr, flush=True)


def silent(text: str) -> None:
    """Print nothing."""


def attaching(stream=None, every: float = 5.0) -> Callable[[int, int, str], None]:
    """Return a progress function for `attach`: a line every few seconds, so none for methods that start at once."""
    stream, last = stream or sys.stderr, time.monotonic()

    def tell(done: int, total: int, path: str) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"attaching: {done}/{total} sites, now {visible(path)}", file=stream, flush=True)

    return tell


def _line(event: Event, title: str, stream) -> None:
    if event.evaluation:
        print(f"{title}: step {event.step}: {judged(event.evaluation)}", file=stream, flush=True)
    elif event.step % max(1, event.steps // 20) == 0 or event.step in (1, event.steps):
        print(
            f"{title}: step {event.step}/{event.steps}, loss {event.loss:.4f}, "
            f"{event.tokens_per_second:,.0f} {event.unit}/s, {clock(event.seconds_left)} left",
            file=stream,
            flush=True,
        )


def judged(evaluation: dict) -> str:
    """Return an evaluation in a few words."""
    accuracy = evaluation.get("accuracy")
    share = "" if accuracy is None else f", {accuracy:.1%} of {len(evaluation['items'])} right"
    return f"evaluation loss {evaluation['loss']:.4f}{share}"


def told(choices: dict) -> list[str]:
    """Return what `fit` chose, a line each, with the numbers behind it."""
    attention, loss, made = choices["attention"], choices["loss"], choices.get("compile")
    seconds = ", ".join(f"{name} {s:.3f} s a step" for name, s in attention["seconds"].items())
    lines = [f"attention: {attention['name']} ({seconds or 'not measured'})"] if attention["name"] else []
    lines.append(f"loss: {loss['name']} ({loss['why']})")
    if made:
        pays = "it never pays" if made["paid"] is None else f"it has paid after {made['paid']:,} steps"
        lines.append(
            f"compiled in {made['seconds']:.1f} s, {made['eager']:.3f} to {made['compiled']:.3f} s a step: {pays}"
        )
    return lines


def clock(seconds: float) -> str:
    """Return seconds as minutes: 75.2 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
