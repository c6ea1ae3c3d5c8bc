"""Small JSON files that prove themselves: their first entry is the SHA-256 of the whole file, itself taken as zeros.

    {
     "sha256": "…",
     "step": 8,
     …

It tells a damaged file, not one that somebody has made on purpose.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import MOST, json_of, reading, shown
from addenda.core.disk.atomic import write_atomically

_START = b'{\n "sha256": "'
_END = len(_START) + 64


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, atomically, with its digest before its entries."""
    whole = {"sha256": "0" * 64} | dict(value)
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    write_atomically(path, _START + _digest(text) + text[_END:])


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the digest. Raises AddendaError for any other file, and a changed one."""
    with reading(path), path.open("rb") as f:
        text = f.read(MOST + 1)
    if not is_sealed(text):
        raise AddendaError(f"{shown(path)} does not begin with a digest of itself, as such a file does.")
    if text[len(_START) : _END] != _digest(text):
        raise AddendaError(f"{shown(path)} is damaged, or was changed: it is not the file whose digest is in it.")
    value = json_of(text, path)  # the very bytes that were proven
    return {k: v for k, v in value.items() if k != "sha256"}


def is_sealed(text: bytes) -> bool:
    """Return whether a file begins as these do."""
    return text.startswith(_START)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(_START + b"0" * 64 + text[_END:]).hexdigest().encode()
