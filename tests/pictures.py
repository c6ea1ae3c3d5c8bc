"""Pictures made here that a tiny model can learn to tell apart by their colour, blue or red, under noise."""

from pathlib import Path

import numpy as np
import transformers
from PIL import Image

NAMES = ("blue", "red")
SIDE = 16


def picture(label: int, seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """(height, width, 3) uint8."""
    made = np.random.default_rng([label, seed]).integers(0, 120, (height, width, 3))
    made[..., 2 * (1 - label)] += 130
    return made.astype(np.uint8)


def write(folder: Path, count: int = 12, start: int = 0, suffix: str = "png") -> Path:
    """Class folders with `count` pictures each."""
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + count):
            Image.fromarray(picture(label, i)).save(folder / name / f"{i:03}.{suffix}")
    return folder


def config(kind=transformers.Dinov2Config, **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}
    more = {"mlp_ratio": 2} if kind is transformers.Dinov2Config else {"intermediate_size": 32}
    return kind(**sizes, **more, **options)


def save_backbone(folder: Path, kind: str = "Dinov2") -> Path:
    """A tiny random backbone without a head, in a folder."""
    import torch

    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Model")(config(getattr(transformers, f"{kind}Config")))
    made.eval().save_pretrained(folder)
    return folder
