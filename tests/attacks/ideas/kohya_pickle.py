"""A file of kohya that is a pickle, by its name and by what is in it."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

READER = "kohya"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name in ("x.ckpt", "x.pt", "x.pth", "x.bin", "y.safetensors"):
        (folder / name).write_bytes(pickle.dumps({"lora_unet_x": 1}, 2))
        yield folder / name
    torch.save({"lora_unet_x.alpha": torch.ones(1)}, folder / "z.safetensors")
    yield folder / "z.safetensors"
