"""Queries and documents that are empty, or of spaces alone."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import line_added

READER = "beir"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name in ("corpus.jsonl", "queries.jsonl"):
        for rest in (b"", b', "text": ""', b', "text": " \\t\\n", "title": "  "', b', "text": "\\u2028"'):
            yield line_added(sound, name, b'{"_id": "x"' + rest + b"}", folder)
