"""A tensor that stands twice in the header of the weights."""

import json
from pathlib import Path

from attacks.files import parts, safetensors

READER = "model"


def make(sound: Path, folder: Path) -> Path:
    header, data = parts(sound / "model.safetensors")
    text = json.dumps(header).encode()
    safetensors(sound / "model.safetensors", text[:-1] + b"," + text[1:], data)
    return sound
