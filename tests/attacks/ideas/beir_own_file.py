"""The file beside a collection that says who is near to whom: nested, of other kinds, of documents not there."""

import json
from collections.abc import Iterator
from pathlib import Path

READER = "beir"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "collection.json"
    good = json.loads(file.read_text())
    texts = ["[" * 100_000, "{", '{"a":[' + "[]," * 3_000_000 + "0]}"]
    texts += [json.dumps(good | entry) for entry in (
        {"near": []}, {"near": {"d1": "d2"}}, {"near": {"d1": [7]}}, {"near": {"d999": ["d1"]}},
        {"sections": {"d1": 7}},
        {"near": {"d1": ["d999"] * 10_000}}, {"sections": {"\u001b[2J": "x"}}, {"language": 7},
        {"query_language": ["a"]},
    )]  # fmt: skip
    for text in texts:
        file.write_text(text)
        yield sound
