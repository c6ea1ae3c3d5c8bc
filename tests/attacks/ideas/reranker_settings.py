"""Settings, schemas and hashes of other kinds and sizes."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "reranker"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "reranker.json"
    good = file.read_text()
    sizes = {"max_length": 24, "stride": None, "batch": 8}
    for entry in (
        {"schema": 2},
        {"schema": True},
        {"settings": []},
        {"settings": sizes | {"batch": 0}},
        {"settings": sizes | {"batch": 10**400}},
        {"settings": sizes | {"max_length": "all"}},
        {"settings": sizes | {"stride": -1}},
        {"settings": sizes | {"more": 1}},
        {"tokenizer": {"sha256": "0" * 64, "entries": 3}},
        {"tokenizer": {"sha256": "x", "entries": 3}},
        {"base": {"sha256": "0" * 64, "folder": "../.."}},
        {"base": {"sha256": "0" * 64, "folder": "/etc"}},
        {"base": {"folder": "base"}},
        {"code": "import os"},
    ):
        file.write_text(good)
        edited(file, **entry)
        yield sound
