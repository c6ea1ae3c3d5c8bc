"""One bit of one tensor is another."""

from collections.abc import Iterator
from pathlib import Path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for place in (-1, -77):
        data = bytearray(sound.read_bytes())
        data[place] ^= 16
        file = folder / f"{-place}.safetensors"
        file.write_bytes(data)
        yield file
