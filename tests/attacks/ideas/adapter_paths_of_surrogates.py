"""Names of sites that hold half a character, which nothing can print."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import at_path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("\ud800", "layers.0.\udfff")):
        yield at_path(sound, folder / f"{i}.safetensors", path)
