"""Lists in lists, a hundred thousand deep."""

import struct
from pathlib import Path

from attacks.files import gguf, gguf_text

READER = "gguf"


def make(sound: Path, folder: Path) -> Path:
    nested = struct.pack("<IQ", 9, 1) * 100_000
    file = folder / "x.gguf"
    file.write_bytes(gguf(gguf_text("a"), struct.pack("<I", 9), nested, counts=(0, 1)))
    return file
