"""Names of sites that are globs and expressions, some of which never end."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("layers.*.self_attn.q_proj", "re:(a+)+$", "(.*.*)*x", "[", "layers.0.self_attn.?_proj")):
        file = folder / f"{i}.safetensors"
        header, data = parts(sound)
        own = json.loads(header["__metadata__"]["addenda"])
        old, own["sites"][0]["path"] = own["sites"][0]["path"], path
        renamed = {(f"{path}/{k.rpartition('/')[2]}" if k.startswith(f"{old}/") else k): v for k, v in header.items()}
        yield safetensors(file, renamed | {"__metadata__": {"addenda": json.dumps(own)}}, data)
