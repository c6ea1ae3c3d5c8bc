"""A configuration of a model a million times as wide as its weights."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, entries in enumerate(({"intermediate_size": 10**9}, {"hidden_size": 2**30}, {"head_dim": 2**40})):
        made = folder / str(i)
        shutil.copytree(sound, made)
        yield edited(made / "config.json", **entries).parent
