"""Search indexes with documents twice, vectors of others, no digest, and text that is no text."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from addenda.core.file.states import write_state
from addenda.ranking.search import FORMAT

READER = "index"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    rows: list[Any] = [["a", "", "one"], ["b", "", "two"]]
    texts = (
        json.dumps([rows[0], rows[0]]).encode(), b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'[["a", "", 7]]',
        b'[["a"]]', b'[[["a"], "", "one"]]', b"[" + b"[]," * 3_000_000 + b"0]",
        b'[["a", "", ""]]', b'[["a", "", "\\ud800"]]',
    )  # fmt: skip
    for i, text in enumerate(texts):
        yield _state(folder / f"{i}.safetensors", text)
    good = json.dumps(rows).encode()
    for i, more in enumerate(
        ({"sha256": "0" * 64}, {"format": "x"}, {"first": "/etc"}, {"first": "../../x"}, {"first": "e5-of-others"},
         {"documents": "text"}, {"vectors": torch.zeros(1, 2)}, {"name": ["x"]}, {"first": 7})
    ):  # fmt: skip
        yield _state(folder / f"more{i}.safetensors", good, **more)


def _state(path: Path, text: bytes, **more: Any) -> Path:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    held = {"format": FORMAT, "name": "x", "first": "bm25", "documents": data,
            "sha256": hashlib.sha256(text).hexdigest()}  # fmt: skip
    write_state(path, held | more, "index")
    return path
