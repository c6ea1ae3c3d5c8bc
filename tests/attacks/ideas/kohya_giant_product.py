"""LoKr's factors, small each, whose product is a terabyte."""

from pathlib import Path

import torch
from safetensors.torch import save_file

READER = "kohya"


def make(sound: Path, folder: Path) -> Path:
    name = "lora_te_layers_0_self_attn_q_proj"
    tensors = {f"{name}.lokr_w1": torch.ones(100_000, 1), f"{name}.lokr_w2": torch.ones(1, 100_000)}
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"
