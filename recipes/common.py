"""What the recipes share: the subject, the command line, planned contrasts, and the verdict that each one leaves.

The subject is a pretrained encoder that a package carries (SPLADE-tiny, a BERT of 4.4 M parameters; `--model minilm`
is MiniLM-L6 of 22 M), and the docstrings of eight installed libraries: which library is a sentence from? See
`addenda.comparing.encoder` and `addenda.data.docstrings`.

A recipe is `addenda compare` with the arms of one claim, so that it is resumable and leaves the same record and report,
and a few lines that read the verdict off the record's planned contrasts.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda import AddendaError
from addenda.comparing.encoder import on_docstrings
from addenda.comparing.record import Record
from addenda.comparing.run import Watch, compare
from addenda.comparing.stats import Comparison, analyse
from addenda.comparing.subject import Subject
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.file.identity import base_of
from addenda.core.file.identity import versions as computed_by
from addenda.models.encoders import ENCODERS
from addenda.models.machine import hardware, versions
from recipes.kept import parsed

VALIDATION = 400  # items that a rate is chosen by


# ---- the subject -----------------------------------------------------------------------------------------------------


def folder_of(model: str) -> Path:
    """Return the folder of an encoder: an embedded one, fetched and made once, or a path."""
    return ENCODERS[model].setup(Watch().say) if model in ENCODERS else Path(model)


def subject(model: str, task: str = "library") -> Subject:
    """Return the encoder with its head fitted on one of the two tasks, as `compare` takes it."""
    on = on_docstrings(folder_of(model), task, tell=Watch().say)
    if sum(p.numel() for p in on.model.parameters()) < 10_000_000:
        torch.set_num_threads(1)  # several only wait for each other at this size
    return on


# ---- running a recipe ------------------------------------------------------------------------------------------------


def options(about: str, name: str, **defaults) -> argparse.Namespace:
    """The command line that all recipes have."""
    parser = argparse.ArgumentParser(prog=f"python -m recipes.{name}", description=about.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("records/recipes") / name, help="record; an old one goes on")
    parser.add_argument("--model", default="splade-tiny", help=f"{', '.join(ENCODERS)}, or a BERT-like folder")
    parser.add_argument("--seeds", type=int, default=defaults.get("seeds", 3))
    parser.add_argument("--steps", type=int, default=defaults.get("steps", 600))
    parser.add_argument("--rates", type=int, default=3, help="learning rates tried for every arm")
    return parsed(parser)


def identity(given: argparse.Namespace, **subjects: Subject) -> dict:
    """What decides the numbers of a recipe's own runs: bases, examples, options and versions."""
    about = {k: {"base": base_of(on.model), "data": {n: e.digest for n, e in on.splits.items()}}
             for k, on in subjects.items()}  # fmt: skip
    said = {k: getattr(given, k) for k in ("steps", "rates", "seeds")}
    return about | said | {"validation": VALIDATION, "versions": computed_by()}


def search_steps(steps: int) -> int:
    """How long the runs of a search for a rate are: half as long as those that are compared.

    With a quarter, every arm took a rate at which it hardly moved: at first a change only disturbs the fitted head.
    """
    return max(min(10, steps), steps // 2)


def compared(given: argparse.Namespace, methods: list[str], title: str, **more) -> tuple[Record, Comparison]:
    """The record of `compare` on the subject, its cost said first, and its statistics. An old one is only read."""
    if given.old:
        record = recorded(given.out, methods)
        given.seeds = len(record.config.seeds)
        return record, analyse(record)
    record = compare(
        methods=methods, out=given.out, budget=f"steps={given.steps}", seeds=given.seeds, rates=given.rates, batch=16,
        items=None, validation=VALIDATION, search_steps=search_steps(given.steps), title=title,
        command=f"python -m recipes.{given.out.name}",
        subject=subject(given.model), watch=Watch(), **more,
    )  # fmt: skip
    return record, analyse(record)


def recorded(out: Path, methods: Iterable[str]) -> Record:
    """A record that is only read. Raises AddendaError where it lacks an arm or one of its final runs."""
    record = Record.read(out)
    done = {(t.method, t.seed) for t in record.trials_of(stage="final")}
    missing = [f"{m}, seed {s}" for m in methods for s in record.config.seeds if (m, s) not in done]
    if missing:
        raise AddendaError(f"{out} is not finished: it lacks {'; '.join(missing)}. Give another --out to run them all.")
    return record


# ---- verdicts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured, and whether it holds."""

    claim: str
    measured: str
    verdict: str  # holds | does not hold | cannot tell


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval."""

    mean: float
    low: float
    high: float

    def above(self, limit: float = 0.0) -> str:
        """Whether the difference is above a limit, as a verdict."""
        return "holds" if self.low > limit else "does not hold" if self.high < limit else "cannot tell"

    def points(self) -> str:
        return f"{self.mean * 100:+.1f} points ({self.low * 100:+.1f} to {self.high * 100:+.1f})"


def gap(found: Comparison, a: str, b: str) -> Interval:
    """Accuracy of arm a minus that of arm b, paired by item and seed."""
    pair = found.pair(a, b)
    if pair is None:
        raise AddendaError(f"{a} and {b} were not compared.")
    if pair.a == a:
        return Interval(pair.difference, pair.low, pair.high)
    return Interval(-pair.difference, -pair.high, -pair.low)


def all_of(verdicts: Iterable[str]) -> str:
    """One verdict of several: what speaks against, else what all of them say."""
    said = set(verdicts)
    if "does not hold" in said:
        return "does not hold"
    return said.pop() if len(said) == 1 else "cannot tell"


def over_seeds(values: Iterable[float]) -> Interval:
    """The mean of one number for each seed, with Student's interval."""
    from scipy import stats

    values = list(values)
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Interval(mean, mean - half, mean + half)


def conclude(given: argparse.Namespace, paper: str, findings: list[Finding], table: list[dict]) -> None:
    """Print claim, measured and verdict, and keep them beside the record, unless it is an old one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(paper), show_lines=True)
    for column in ("claim", "measured", "verdict"):
        shown.add_column(column)
    for finding in findings:
        shown.add_row(*map(escape, (finding.claim, finding.measured, finding.verdict)))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)
    if given.old:
        return
    kept = {
        "paper": paper,
        "command": f"python -m recipes.{given.out.name}",
        "versions": versions(),
        "hardware": hardware(),
        "findings": [asdict(f) for f in findings],
        "table": table,
    }
    write_atomically(given.out / "verdict.json", (readable(kept) + "\n").encode())


@torch.no_grad()
def in_turns(
    nets: Mapping[Any, nn.Module], x: torch.Tensor, rounds: int = 30, *, repeat: int = 1, warm: int = 3
) -> dict[Any, list[float]]:
    """Seconds of each net for x, in turns, the mean of `repeat` calls; the first `warm` turns are not counted."""
    found: dict[Any, list[float]] = {name: [] for name in nets}
    for turn in range(warm + rounds):
        for name, net in nets.items():
            started = time.perf_counter()
            for _ in range(repeat):
                net(x)
            if turn >= warm:
                found[name].append((time.perf_counter() - started) / repeat)
    return found
