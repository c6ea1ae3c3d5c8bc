"""Tensors of other shapes, not finite, or of no numbers."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

READER = "kohya"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    name = "lora_te_layers_0_self_attn_q_proj"
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    for i, change in enumerate(
        (
            {"lora_down.weight": torch.ones(2, 9)},
            {"lora_down.weight": down * float("nan")},
            {"lora_up.weight": up[:0]},
            {"alpha": torch.tensor(float("inf"))},
            {"lora_mid.weight": torch.ones(2, 2, 3, 3)},
            {"lora_up.weight": up.long()},
            {"lora_up.weight": torch.ones(8, 3)},
            {"other": torch.ones(1)},
            {"dora_scale": torch.ones(5, 1)},
        )
    ):
        tensors = {"lora_down.weight": down, "lora_up.weight": up} | change
        save_file({f"{name}.{k}": t for k, t in tensors.items()}, folder / f"{i}.safetensors")
        yield folder / f"{i}.safetensors"
