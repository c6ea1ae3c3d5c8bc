"""A GGUF file of another version, of another order of bytes, and four letters alone."""

from collections.abc import Iterator
from pathlib import Path

READER = "gguf"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, data in enumerate(
        (b"GGUF", b"GGUF" + bytes(20), b"GGUF" + b"\xff" * 20, b"GGUF\0\0\0\x03" + bytes(16), b"gguf" + bytes(40))
    ):
        file = folder / f"{i}.gguf"
        file.write_bytes(data)
        yield file
