"""A hundred thousand brackets, and a file of megabytes."""

from collections.abc import Iterator
from pathlib import Path

READER = "run_file"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for text in ("[" * 60_000, "{a: " * 10_000, "- " * 30_000, "steps: 4\n" * 10**6, "a: " + "x" * 10**6, "\0", ""):
        sound.write_text(text)
        yield sound
