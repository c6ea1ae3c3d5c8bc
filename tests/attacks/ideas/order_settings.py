"""An adapter that orders images of a giant's settings, or of settings, scales and widths that are none."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from addenda.ranking.order.file import _BEFORE
from attacks.files import parts

READER = "order"
_CHANGES: tuple[dict[str, Any], ...] = (
    {"width": 1 << 14},
    {"width": 2**62, "heads": 1},
    {"layers": 64, "after": 64},
    {"layers": 10**9},
    {"ratio": 2**62},
    {"ratio": 10**9},
    {"prompts": 2**40},
    {"tokens": 2**62},
    {"prompts": 10**400},
    {"dropout": "x"},
    {"dropout": [0.5]},
    {"pool": ["sum"]},
    {"heads": True},
    {"width": 0},
    {"more": 1},
)


def make(sound: Path, folder: Path) -> Iterator[Path]:
    header, data = parts(sound)
    said = json.loads(header["__metadata__"]["order"])
    changed = [said | {"settings": said["settings"] | change} for change in _CHANGES]
    changed += [
        said | change for change in (
            {"widths": [2**62, 4]}, {"widths": [4]}, {"widths": "44"}, {"scales": {}}, {"scales": {"a": [0, 0]}},
            {"scales": {"a": [1e400, 1]}}, {"scales": {"a": [1, -1]}}, {"scales": []}, {"towers": []}, {"training": 7},
            {"format": "x" * 10**6}, {"settings": {}},
        )
    ]  # fmt: skip
    for i, about in enumerate(changed):
        yield _sealed(
            folder / f"{i}.safetensors",
            header | {"__metadata__": {"order": json.dumps(about, separators=(",", ":"))}},
            data,
        )
    texts = ("[" * 100_000, "null", "", '{"a":[' + "[]," * 3_000_000 + "0]}")
    for i, text in enumerate(texts):
        yield _sealed(folder / f"text{i}.safetensors", header | {"__metadata__": {"order": text}}, data)


def _sealed(file: Path, header: dict, data: bytes) -> Path:
    """A file with a digest that is right, where it has the place for one."""
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    at = 8 + len(_BEFORE)
    if text.startswith(_BEFORE):
        zeros = whole[:at] + b"0" * 64 + whole[at + 64 :]
        whole = whole[:at] + hashlib.sha256(zeros).hexdigest().encode() + whole[at + 64 :]
    file.write_bytes(whole)
    return file
