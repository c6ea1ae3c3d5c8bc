"""What `recipes.lord` prints of its own: findings, their verdicts, and times taken in turns."""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from addenda.core.disk.atomic import readable, write_atomically
from addenda.models.machine import hardware, versions


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


def all_of(verdicts: Iterable[str]) -> str:
    """One verdict of several: what speaks against, else what all of them say."""
    said = set(verdicts)
    if "does not hold" in said:
        return "does not hold"
    return said.pop() if len(said) == 1 else "cannot tell"


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
