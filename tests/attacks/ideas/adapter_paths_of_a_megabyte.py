"""The name of a site that is a megabyte long, and one of a hundred thousand parts."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("x" * (1 << 20), "a." * 100_000)):
        file = folder / f"{i}.safetensors"
        header, data = parts(sound)
        own = json.loads(header["__metadata__"]["addenda"])
        old, own["sites"][0]["path"] = own["sites"][0]["path"], path
        renamed = {(f"{path}/{k.rpartition('/')[2]}" if k.startswith(f"{old}/") else k): v for k, v in header.items()}
        yield safetensors(file, renamed | {"__metadata__": {"addenda": json.dumps(own)}}, data)
