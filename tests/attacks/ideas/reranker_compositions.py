"""Compositions without end, of other kinds, and with numbers that are none."""

import json
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "reranker"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "reranker.json"
    good = file.read_text()
    deep: dict = {"stack": ["de", "task"]}
    for _ in range(200):
        deep = {"stack": [deep]}
    for made in (
        deep, [], None, "stack", {"exec": ["de", "task"]}, {"stack": []}, {"stack": ["de"] * 10_000},
        {"stack": ["de", "task"], "skip": "x" * 10_000}, {"stack": ["de", "task"], "leave_out": ["*"] * 10_000},
        {"stack": ["de", "task"], "leave_out": {"de": "first:99999999999999"}},
        {"average": ["de", "task"], "weights": [1e308, 1e308]}, {"average": ["de", "task"], "weights": [1]},
        {"fuse": ["de", "task"], "by": "task"}, {"split": ["de", "task"], "sizes": [-1, 5]},
        {"split": ["de", "task"], "by": "separator:-1"}, {"split": ["de", "task"], "by": "__import__"},
        {"stack": ["de", "task"], "average": ["de"]},
    ):  # fmt: skip
        file.write_text(good)
        edited(file, composition=made)
        yield sound
    entry = json.loads(good)
    for text in (
        "[" * 100_000,
        '{"a":[' + "[]," * 3_000_000 + "0]}",
        "",
        "null",
        json.dumps(entry)[:-1] + ', "schema": 1}',
    ):
        file.write_text(text)
        yield sound
