"""A configuration that names the file of its weights: transformers opens a pickle of one name."""

from collections.abc import Iterator
from pathlib import Path

import torch

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    torch.save({"a": torch.ones(1)}, sound / "adapter_model.bin")
    for name in ("adapter_model.bin", "../x.safetensors", ["x"], 7):
        yield edited(sound / "config.json", transformers_weights=name).parent
