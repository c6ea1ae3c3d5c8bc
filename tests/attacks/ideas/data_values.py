"""Numbers of a million digits, no numbers, keys twice, half characters, and bytes that are no text."""

from collections.abc import Iterator
from pathlib import Path

READER = "data"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    lines = (
        b'{"question": ' + b"1" * 10**6 + b', "answer": "x"}',
        b'{"question": "a", "answer": NaN}',
        b'{"question": "a", "answer": 1e400}',
        b'{"question": "a", "question": "b", "answer": "c"}',
        b'{"question": "a", "answer": "\\ud800"}',
        b'\xff\xfe{"question"',
        b"\0" * 100,
        b'{"a": "b"}',
    )
    for i, line in enumerate(lines):
        file = folder / f"{i}.jsonl"
        file.write_bytes(line + b"\n")
        yield file
