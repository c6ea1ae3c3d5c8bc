"""Lines of a collection that are no objects of JSON, or objects that no document is."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import line_added

READER = "beir"
LINES = (
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"_id": "x", "text": ' + b"1" * 10**6 + b"}",
    b'{"_id": "x", "text": "a", "text": "b"}',
    b'{"_id": "x", "text": "\\ud800"}',
    b'{"_id": "x", "text": NaN}',
    b'{"_id": "x", "text": ["a"]}',
    b'{"_id": 7, "text": "a"}',
    b'{"_id": "", "text": "a"}',
    b'{"_id": "a\\tb", "text": "a"}',
    b'{"_id": "\\u001b[2J", "text": ""}',
    b'{"text": "a"}',
    b"[]",
    b"\xff\xfe{",
    b"\0" * 1000,
    b'{"_id": "x", "title": 1e400, "text": "a"}',
)


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name in ("corpus.jsonl", "queries.jsonl"):
        for line in LINES:
            yield line_added(sound, name, line, folder)
