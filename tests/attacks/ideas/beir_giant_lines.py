"""A line of a gigabyte, most of it a hole in the file, and a corpus of line ends alone."""

from collections.abc import Iterator
from pathlib import Path

READER = "beir"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        file = sound / name
        good = file.read_bytes()
        with file.open("ab") as f:
            f.truncate(1 << 30)
        yield sound
        file.write_bytes(b"\n" * 10**6)
        yield sound
        file.write_bytes(good)
