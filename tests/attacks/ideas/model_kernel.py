"""An attention kernel of somebody's repository, which transformers would fetch and run."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, entries in enumerate(({"attn_implementation": "somebody/kernel"}, {"_attn_implementation": "a/b@main:f"})):
        made = folder / str(i)
        shutil.copytree(sound, made)
        yield edited(made / "config.json", **entries).parent
