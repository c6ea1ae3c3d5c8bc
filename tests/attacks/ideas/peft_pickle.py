"""An adapter of PEFT whose weights are a pickle only."""

import pickle
from collections.abc import Iterator
from pathlib import Path

READER = "peft"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    (sound / "adapter_model.safetensors").unlink()
    (sound / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    yield sound
    yield sound / "adapter_model.bin"
