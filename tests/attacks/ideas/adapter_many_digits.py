"""A whole number of a hundred thousand digits, where a step, a seed, a rank or a shape is meant."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied, parts

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    number = "1" + "0" * 100_000
    for key in ("step", "seed", "rank", "shape"):
        text = json.dumps(json.loads(parts(sound)[0]["__metadata__"]["addenda"]))
        there = {"step": '"step": 0', "seed": '"seed": 0', "rank": '"rank": 2', "shape": '"shape": [8'}[key]
        assert there in text, key
        broken = text.replace(there, there[:-1] + number, 1)
        yield adapter(copied(sound, key), lambda _, broken=broken: broken)
