"""A header of 12 MB that is six million numbers."""

from pathlib import Path

from attacks.files import safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Path:
    return safetensors(folder / "x.safetensors", b'{"a":[' + b"7," * 6_000_000 + b"0]}")
