"""Names of sites that hold half a character, which nothing can print."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("\ud800", "layers.0.\udfff")):
        file = folder / f"{i}.safetensors"
        header, data = parts(sound)
        own = json.loads(header["__metadata__"]["addenda"])
        old, own["sites"][0]["path"] = own["sites"][0]["path"], path
        renamed = {(f"{path}/{k.rpartition('/')[2]}" if k.startswith(f"{old}/") else k): v for k, v in header.items()}
        yield safetensors(file, renamed | {"__metadata__": {"addenda": json.dumps(own)}}, data)
