"""Indices of shards that are none, name what is missing, or lead out of the folder."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

READER = "weights"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    texts = ["{}", "[]", "[" * 100_000, '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}']
    texts += [
        json.dumps({"weight_map": {"a": n}})
        for n in ("../x.safetensors", "/x.safetensors", "x.bin", "\x1b.safetensors")
    ]
    (sound / "model.safetensors").rename(folder / "x.safetensors")
    for i, text in enumerate(texts):
        made = folder / str(i)
        shutil.copytree(sound, made)
        (made / "model.safetensors.index.json").write_text(text)
        yield made
