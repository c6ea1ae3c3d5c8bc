"""Tags that make objects of Python, and keys that merge others."""

from collections.abc import Iterator
from pathlib import Path

READER = "run_file"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for text in (
        "steps: !!python/object/apply:os.system [id]",
        "a: !!python/name:os.system",
        "<<: {steps: 4}",
        "steps: !!int 4",
        "!!python/module:os",
        "? [a]\n: b",
    ):
        sound.write_text(text)
        yield sound
