"""A header of 12 MB that is four million empty lists."""

from pathlib import Path

from attacks.files import safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Path:
    return safetensors(folder / "x.safetensors", b'{"a":[' + b"[]," * 4_000_000 + b"0]}")
