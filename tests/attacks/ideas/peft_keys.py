"""Keys of tensors that lead nowhere, or out of the model."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "peft"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    header, data = parts(sound / "adapter_model.safetensors")
    for i, key in enumerate(
        ("base_model.model.__class__", "base_model.model.../x", "base_model.model.\x1b[2J", "x", "\ud800")
    ):
        made = folder / str(i)
        made.mkdir()
        (made / "adapter_config.json").write_bytes((sound / "adapter_config.json").read_bytes())
        changed = {(f"{key}.lora_A.weight" if k.endswith("lora_A.weight") else k): v for k, v in header.items()}
        safetensors(made / "adapter_model.safetensors", changed, data)
        yield made
