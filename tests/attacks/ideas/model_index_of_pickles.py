"""An index of safetensors shards that names a pickle, which transformers opens."""

from pathlib import Path

import torch

from attacks.files import index

READER = "model"


def make(sound: Path, folder: Path) -> Path:
    torch.save({"a": torch.ones(1)}, sound / "pytorch_model.bin")
    index(sound, "pytorch_model.bin")
    return sound
