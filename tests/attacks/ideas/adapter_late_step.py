"""A step that is reached after longer than anybody lives, for schedules that would count up to it."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, (name, step) in enumerate((n, s) for n in ("dylora", "adalora", "mosa") for s in (2**62, 10**30, -1, 1.5)):
        yield adapter(
            copied(sound, i),
            lambda own, n=name, s=step: own.update(step=s, methods=[{"name": n, "options": {"rank": 2}}]),
        )
