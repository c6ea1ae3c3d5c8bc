"""Names of sites that move a terminal's cursor, turn text around or end it."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import at_path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("\x1b[2J\x1b]0;x\x07", "layers.0\0.q_proj", "\u202elayers", "a\nb\r", "\x9b31m")):
        yield at_path(sound, folder / f"{i}.safetensors", path)
