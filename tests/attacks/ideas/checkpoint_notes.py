"""Notes of a checkpoint that are none: brackets, keys twice, steps that are no numbers."""

from collections.abc import Iterator
from pathlib import Path

READER = "checkpoint"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "addenda.json"
    for text in (
        "[" * 100_000,
        "[]",
        "{}",
        '{"step": 1, "step": 2, "settings": {}}',
        '{"step": -1, "settings": {}}',
        '{"step": 1e400, "settings": {}}',
        '{"step": true, "settings": {}}',
        '{"step": ' + "9" * 5000 + ', "settings": {}}',
        '{"step": 1}',
        "",
    ):
        file.write_text(text)
        yield sound
