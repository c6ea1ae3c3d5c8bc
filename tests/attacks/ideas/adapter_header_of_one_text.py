"""A header of 15 MB that is one text, with a character that makes each of the others four bytes."""

from pathlib import Path

from attacks.files import safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Path:
    return safetensors(folder / "x.safetensors", b'{"a":"' + b"x" * 15_000_000 + "😀".encode() + b'"}')
