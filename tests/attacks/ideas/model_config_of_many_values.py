"""A configuration of so many values that it is not looked through, which names a pickle for its weights."""

import json
from pathlib import Path

READER = "model"


def make(sound: Path, folder: Path) -> Path:
    file = sound / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"transformers_weights": "x.bin", "pad": [0] * 600_000}))
    (sound / "x.bin").write_bytes(b"\x80\x04N.")
    return sound
