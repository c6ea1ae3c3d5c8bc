"""Names of sites that lead out of a folder."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import at_path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("..", "../x", "/etc/passwd", "layers/../../x", "~", "C:\\x")):
        yield at_path(sound, folder / f"{i}.safetensors", path)
