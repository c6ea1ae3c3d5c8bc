"""Headers with brackets without end, a key twice, and offsets on one another."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "kohya"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    yield safetensors(folder / "a.safetensors", b"[" * 100_000)
    header, data = parts(sound)
    text = json.dumps(header).encode()
    yield safetensors(folder / "b.safetensors", text[:-1] + b"," + text[1:], data)
    yield safetensors(folder / "c.safetensors", {k: v | {"data_offsets": [0, 4]} for k, v in header.items()}, data)
    yield safetensors(folder / "d.safetensors", b'{"lora_unet_x":[' + b"[]," * 10_000_000 + b"0]}")
