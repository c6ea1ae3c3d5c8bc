"""What a comparison shows while it runs: a live table on a terminal, a line for each run elsewhere."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from addenda.comparing.record import Record
from addenda.comparing.request import Watch
from addenda.core.base.visible import visible
from addenda.train.fit import Event


@dataclass
class _Row:
    """What the table shows of one arm; tests: accuracies of its final runs so far."""

    doing: str = ""
    step: str = ""
    loss: str = ""
    speed: str = ""
    tests: list[float] = field(default_factory=list)


class Board:
    """The table of a running comparison: a context manager; `watch(ask)` is what `compare` takes."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self.started, self.now = time.monotonic(), None
        self.rows: dict[str, _Row] = {}

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_) -> None:
        if self.live is not None and self.live.is_started:
            self.live.stop()

    def watch(self, ask: Callable[[str], bool]) -> Watch:
        return Watch(self.say, ask, self.trial, self.done)

    def say(self, text: str) -> None:
        self.console.print(visible(text), highlight=False, markup=False)

    def trial(self, label: str, stage: str, seed: int | None, rate: float | None) -> Callable[[Event], None]:
        """Show that a run begins; return a function to tell of every step."""
        self.now = (label, stage, seed, rate)
        row = self.rows.setdefault(label, _Row())
        row.doing, row.step, row.loss = _doing(stage, seed, rate), "", ""
        if self.live is not None and not self.live.is_started:
            self.live.start()

        def tell(event: Event) -> None:
            row.step = f"{event.step}/{event.steps}"
            row.loss = f"{event.loss:.3f}"
            row.speed = f"{event.tokens_per_second:,.0f} {event.unit}/s"
            if self.live is not None:
                self.live.update(self.table())

        return tell

    def done(self, record: Record) -> None:
        """Show the result of a run that ended."""
        if not record.trials or self.now is None:
            return
        last = record.trials[-1]
        label, stage, seed, rate = last.method, last.stage, last.seed, last.rate
        row = self.rows.setdefault(label, _Row())
        if stage != "search" and last.test is not None:
            row.tests.append(last.test.accuracy)
        row.doing = "" if last.status == "ok" else last.status
        if self.live is not None and self.live.is_started:
            self.live.update(self.table())
            return
        result = f"test {last.test.accuracy:.1%}" if last.test is not None else ""
        if last.last_look and stage == "search":
            loss = last.last_look.loss
            known = loss is not None and math.isfinite(loss)
            result = f"validation loss {loss:.3f}" if known else "validation loss not finite"
        pace = f", {last.step_seconds:.2f} s a step" if last.step_seconds else ""
        self.say(f"{self._clock()} {label} {_doing(stage, seed, rate)}: {last.status}, {result}{pace}")

    def table(self) -> Table:
        table = Table(title=f"comparing, {self._clock()}", title_justify="left")
        for name in ("arm", "now", "step", "loss", "speed", "test so far"):
            table.add_column(name, justify="left" if name in ("arm", "now") else "right")
        for label, row in self.rows.items():
            tests = " ".join(f"{t:.1%}" for t in row.tests)
            table.add_row(Text(visible(label)), row.doing, row.step, row.loss, row.speed, tests)
        return table

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60}:{seconds % 60:02d}"


def _doing(stage: str, seed: int | None, rate: float | None) -> str:
    if stage == "search":
        return f"searching, rate {rate:g}"
    return "judging the base" if stage == "control" else f"seed {seed}, rate {rate:g}"


def terminal() -> bool:
    """Return whether someone is there to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()
