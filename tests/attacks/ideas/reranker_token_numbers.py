"""A tokenizer in which a word has a number of billions, so that all below are to be listed."""

import json
from collections.abc import Iterator
from pathlib import Path

READER = "reranker"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "tokenizer" / "tokenizer.json"
    good = json.loads(file.read_text())
    for number in (89_000_000, 2**31, 2**32 - 1, 2**63, -1):
        good["model"]["vocab"]["b22"] = number
        file.write_text(json.dumps(good))
        yield sound
