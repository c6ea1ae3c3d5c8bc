"""An adapter that was trained on another base, under a description that says it is the right file."""

import json
from collections.abc import Iterator
from pathlib import Path

import addenda as ad
from addenda.core.disk.access import sha256_of
from ranking.toy import toy_model
from shared import stir

READER = "reranker"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for method in ("pfeiffer:rank=4", "sparse:count=4", "shira:density=0.1"):
        other = toy_model(seed=7)
        file = sound / "adapters" / "de.safetensors"
        stir(ad.attach(other, method, name="de")).save(folder / "other.safetensors")
        (folder / "other.safetensors").replace(file)
        said = json.loads((sound / "reranker.json").read_text())
        said["adapters"]["de"]["sha256"] = sha256_of(file)
        (sound / "reranker.json").write_text(json.dumps(said))
        yield sound
