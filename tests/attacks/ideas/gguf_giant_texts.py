"""Texts and lists of 2^63 bytes in a file of a hundred."""

import struct
from collections.abc import Iterator
from pathlib import Path

from attacks.files import gguf, gguf_text

READER = "gguf"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    length = struct.pack("<Q", 2**63 - 1)
    name = gguf_text("general.architecture")
    made = (
        gguf(length, counts=(0, 1)),
        gguf(name, struct.pack("<I", 8), length, counts=(0, 1)),
        gguf(name, struct.pack("<II", 9, 0), length, counts=(0, 1)),
        gguf(name, struct.pack("<II", 9, 9), struct.pack("<Q", 2**40), counts=(0, 1)),
        gguf(name, struct.pack("<I", 77), counts=(0, 1)),
    )
    for i, data in enumerate(made):
        file = folder / f"{i}.gguf"
        file.write_bytes(data)
        yield file
