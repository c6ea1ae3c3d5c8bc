"""Entries of the configuration that are of another kind."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, entries in enumerate(
        (
            {"hidden_size": "8"},
            {"num_attention_heads": 0},
            {"vocab_size": -1},
            {"hidden_act": "os.system"},
            {"model_type": "../x"},
            {"model_type": ["llama"]},
        )
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        yield edited(made / "config.json", **entries).parent
