"""A quote that never closes, a row of a million fields, and fields that are not of the header."""

from collections.abc import Iterator
from pathlib import Path

READER = "data"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, text in enumerate(
        ('question,answer\n"' + "x" * 10**6, "question,answer\n" + "," * 10**5, "a,a\n1,2", "", "\0,\0\n1,2")
    ):
        file = folder / f"{i}.csv"
        file.write_text(text)
        yield file
