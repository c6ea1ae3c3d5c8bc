"""A header that is 60 MB of spaces."""

from pathlib import Path

from attacks.files import safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Path:
    return safetensors(folder / "x.safetensors", b"{}" + b" " * 60_000_000)
