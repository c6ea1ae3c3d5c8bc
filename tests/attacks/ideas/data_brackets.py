"""A line of a hundred thousand brackets."""

from collections.abc import Iterator
from pathlib import Path

READER = "data"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, text in enumerate(("[" * 100_000, '{"question":' * 100_000, '{"question": "a", "answer": ' + "[" * 100_000)):
        file = folder / f"{i}.jsonl"
        file.write_text(text + "\n")
        yield file
