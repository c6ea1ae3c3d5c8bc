"""Reports of a compression that hold nothing, divide by nothing, or are nested too deeply."""

from collections.abc import Iterator
from pathlib import Path

READER = "compressed"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for text in (
        "{}",
        "[]",
        "[" * 100_000,
        "null",
        '{"layers": []}',
        '{"layers": [{"m": 0, "n": 0, "parameters": 1}]}',
        "",
    ):
        (sound / "compress.json").write_text(text)
        yield sound
