"""Documents and queries that are there twice, and judgements of what is not there."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import line_added

READER = "beir"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name, line in (
        ("corpus.jsonl", b'{"_id": "d1", "text": "another"}'),
        ("queries.jsonl", b'{"_id": "q1", "text": "another"}'),
        ("qrels/test.tsv", b"q999\td1\t1"),
        ("qrels/test.tsv", b"q3\td999\t1"),
        ("qrels/test.tsv", b"\x1b[2J\t\xe2\x80\xaed1\t1"),
    ):
        yield line_added(sound, name, line, folder)
