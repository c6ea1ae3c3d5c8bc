"""A configuration of a vocabulary that no machine has room for."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, entries in enumerate(({"vocab_size": 2**40}, {"vocab_size": 10**7})):
        made = folder / str(i)
        shutil.copytree(sound, made)
        yield edited(made / "config.json", **entries).parent
