"""An index that names shards in another folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import index

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, name in enumerate(
        ("../kept.safetensors", "/kept.safetensors", "a/../../kept.safetensors", "x\0.safetensors")
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        index(made, name)
        yield made
