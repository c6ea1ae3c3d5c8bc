"""A key that stands twice, in the header of tensors and in that of the adapter."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, parts, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    header, data = parts(sound)
    text = json.dumps(header, separators=(",", ":")).encode()
    name = list(header)[1]
    entry = json.dumps({name: header[name]}, separators=(",", ":")).encode()[1:-1]
    yield safetensors(folder / "a.safetensors", text[:-1] + b"," + entry + b"}", data)
    own = header["__metadata__"]["addenda"]
    file = folder / "b.safetensors"
    file.write_bytes(sound.read_bytes())
    yield adapter(file, lambda _: own[:-1] + ', "seed": 7}')
