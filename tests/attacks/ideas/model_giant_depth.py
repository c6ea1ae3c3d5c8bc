"""A configuration of a thousand million layers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, entries in enumerate(
        ({"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**400}, {"num_hidden_layers": 5000})
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        yield edited(made / "config.json", **entries).parent
