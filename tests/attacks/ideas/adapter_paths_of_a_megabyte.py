"""The name of a site that is a megabyte long, and one of a hundred thousand parts."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import at_path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("x" * (1 << 20), "a." * 100_000)):
        yield at_path(sound, folder / f"{i}.safetensors", path)
