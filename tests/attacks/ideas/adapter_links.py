"""A link to itself, to a device without end and to a folder; a pipe that nobody writes into."""

import os
from collections.abc import Iterator
from pathlib import Path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    (folder / "self.safetensors").symlink_to("self.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    (folder / "up.safetensors").symlink_to("..")
    os.mkfifo(folder / "pipe.safetensors")
    yield from (folder / f"{name}.safetensors" for name in ("self", "zero", "up", "pipe"))
