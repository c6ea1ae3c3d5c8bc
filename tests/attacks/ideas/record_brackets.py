"""A record whose configuration is nested too deeply, twice there, or of other kinds."""

from collections.abc import Iterator
from pathlib import Path

READER = "record"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "config.json"
    good = file.read_text()
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        good.rstrip()[:-1] + ', "seeds": [1]}',
        "",
        '{"a":[' + "[]," * 3_000_000 + "0]}",
    ):
        file.write_text(text)
        yield sound
