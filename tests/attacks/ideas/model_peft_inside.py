"""An adapter of PEFT in a model's folder, which transformers would put on it without a word."""

from pathlib import Path

READER = "model"


def make(sound: Path, folder: Path) -> Path:
    (sound / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return sound
