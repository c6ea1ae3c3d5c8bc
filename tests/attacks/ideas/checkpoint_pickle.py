"""The adapter of a checkpoint is a pickle, another adapter's, or cut."""

import pickle
from collections.abc import Iterator
from pathlib import Path

READER = "checkpoint"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "adapter.safetensors"
    good = file.read_bytes()
    for data in (pickle.dumps(print), b"", good[:-1], b"PK\x03\x04" + good, good.replace(b"q_proj", b"k_proj")):
        file.write_bytes(data)
        yield sound
