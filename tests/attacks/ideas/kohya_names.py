"""Names of modules that are in no model, paths, and a hundred thousand of them."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import safetensors

READER = "kohya"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, names in enumerate(
        (["lora_te_.._x"], ["lora_te___class__"], ["lora_te_\x1b[2J"], [f"lora_te_x{n}" for n in range(2000)])
    ):
        entries = {f"{name}.lora_down.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
        yield safetensors(folder / f"{i}.safetensors", entries)
