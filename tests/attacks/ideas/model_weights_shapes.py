"""Weights of shapes without bytes, on one another's bytes, or outside of the file."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import wrong_shapes

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    yield from wrong_shapes(sound, folder)
