"""A GGUF file that claims 2^60 tensors, or as many fields."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import gguf

READER = "gguf"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, data in enumerate(
        (gguf(counts=(2**60, 0)), gguf(counts=(0, 2**60)), gguf(counts=(2**63, 2**63)), gguf(counts=(1, 1)))
    ):
        file = folder / f"{i}.gguf"
        file.write_bytes(data)
        yield file
