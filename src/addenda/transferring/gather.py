"""Inputs for a student: made by the target, judged by the discriminator, batch by batch, until enough have passed.

What is there after every batch is on disk, so that a killed gathering goes on with the next one and ends with the same
inputs. Where a cap comes before N have passed, the best of the others by margin fill up, and the result says how many.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from addenda.core.disk.access import writing
from addenda.core.file.states import kept as read_kept
from addenda.core.file.states import write_state
from addenda.transferring.discriminator import kept
from addenda.transferring.sides import Sides
from addenda.transferring.synthesise import Caps, Counts, Sampler, Synthesis, nothing

FILE = "synthesis.safetensors"


@dataclass(frozen=True)
class Gathered:
    """What was made, and which of it is taken. margins: of all new inputs; chosen: positions among them.

    passed: how many margins are above the threshold; filled: how many of the chosen are not; seconds: of judging.
    """

    made: Synthesis = field(default_factory=Synthesis)
    margins: list[float] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    passed: int = 0
    seconds: float = 0.0

    @property
    def texts(self) -> list[str]:
        return [self.made.texts[i] for i in self.chosen]

    @property
    def filled(self) -> int:
        return max(len(self.chosen) - self.passed, 0)

    def acceptance(self) -> dict[str, float | None]:
        """Return the share that passes each stage: of lines the format, of these the new ones, of these the judge."""
        c = self.made.counts
        formed = c.lines - c.malformed
        stages = {
            "format": (formed, c.lines),
            "new": (c.new, formed),
            "discriminator": (self.passed, len(self.margins)),
        }
        return {name: part / whole if whole else None for name, (part, whole) in stages.items()}


def gather(
    sampler: Sampler,
    sides: Sides,
    n: int,
    caps: Caps,
    *,
    threshold: float = 0.0,
    batch: int = 32,
    folder: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Gathered:
    """Return n inputs, those that pass the threshold first, in the order in which they were made.

    folder: where the file of what is done stands; None: nowhere. Raises AddendaError where nothing at all was usable.
    """
    found = _begun(folder)
    while _passed(found, threshold) < n and not (stopped := caps.reached(found.made.counts)):
        with sides.bare():
            more = sampler.more(found.made, caps)
        began = time.perf_counter()
        judge = sides.judge
        margins = sides.discriminator.margins(judge.model, judge.tokenizer, more.texts, batch=batch)
        seconds = found.seconds + time.perf_counter() - began
        found = replace(found, made=found.made + more, margins=[*found.margins, *margins], seconds=seconds)
        if folder is not None:
            with writing(folder):
                write_state(folder / FILE, _state(found), "synthetic inputs")
        if say is not None:
            say(f"{_passed(found, threshold):,} of {n:,} inputs pass; {found.made.counts}")
    if not found.made.texts:
        raise nothing(found.made, sampler.format)
    return chosen(found, n, threshold, stopped if _passed(found, threshold) < n else "")


def chosen(found: Gathered, n: int, threshold: float, stopped: str = "") -> Gathered:
    """Return what was gathered with n inputs chosen: the first to pass, then the best of the others by margin."""
    passing = kept(found.margins, threshold)
    first = passing[:n]
    missing = n - len(first)
    passed = set(passing)
    rest = [i for i in range(len(found.margins)) if i not in passed]
    best = [rest[i] for i in kept([found.margins[i] for i in rest], None, top=missing)] if missing and rest else []
    made = replace(found.made, stopped=stopped)
    return replace(found, made=made, chosen=sorted([*first, *best]), passed=len(passing))


def _passed(found: Gathered, threshold: float) -> int:
    return sum(m > threshold for m in found.margins)


def _state(found: Gathered) -> dict[str, Any]:
    made = found.made
    about = {"texts": made.texts, "counts": asdict(made.counts), "refused": made.refused}
    return about | {"margins": found.margins, "seconds": found.seconds}


def _begun(folder: Path | None) -> Gathered:
    """Return what a killed gathering has left; nothing where there is none, or it is damaged."""
    state = None if folder is None else read_kept(folder / FILE, _is_sound)
    if state is None:
        return Gathered()
    made = Synthesis(state["texts"], Counts(**state["counts"]), refused=state["refused"])
    return Gathered(made, state["margins"], seconds=state["seconds"])


def _is_sound(state: Any) -> bool:
    counts = Counts(**state["counts"])
    texts = all(isinstance(t, str) for t in [*state["texts"], *state["refused"]])
    numbers = all(isinstance(m, float) for m in [*state["margins"], state["seconds"]])
    return texts and numbers and len(state["texts"]) == len(state["margins"]) == counts.new
