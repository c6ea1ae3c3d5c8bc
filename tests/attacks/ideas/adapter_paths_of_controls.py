"""Names of sites that move a terminal's cursor, turn text around or end it."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("\x1b[2J\x1b]0;x\x07", "layers.0\0.q_proj", "\u202elayers", "a\nb\r", "\x9b31m")):
        file = folder / f"{i}.safetensors"
        header, data = parts(sound)
        own = json.loads(header["__metadata__"]["addenda"])
        old, own["sites"][0]["path"] = own["sites"][0]["path"], path
        renamed = {(f"{path}/{k.rpartition('/')[2]}" if k.startswith(f"{old}/") else k): v for k, v in header.items()}
        yield safetensors(file, renamed | {"__metadata__": {"addenda": json.dumps(own)}}, data)
