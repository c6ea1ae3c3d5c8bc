"""A pickle that runs a command as it is opened, under the name of an adapter, and one in a zip."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from attacks.files import Harm, written

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    yield written(folder / "a.safetensors", pickle.dumps(Harm()))
    torch.save({"a": torch.ones(1), "b": Harm()}, folder / "b.safetensors")
    yield folder / "b.safetensors"
