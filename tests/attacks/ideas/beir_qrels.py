"""Judgements in other columns, without a header, of grades that are none, twice, and of no answer."""

from collections.abc import Iterator
from pathlib import Path

READER = "beir"
HEADER = b"query-id\tcorpus-id\tscore\n"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    good = b"q3\td3\t1\n"
    for text in (
        b"",
        HEADER,
        good,
        HEADER + b"q3 d3 1\n",
        HEADER + good + good,
        HEADER + b"q3\td3\t0\n",
        HEADER + good + b"q3" + b"\t" * 10**6 + b"\n",
        *(HEADER + b"q3\td3\t" + grade + b"\n" for grade in (
            b"NaN", b"inf", b"1e400", b"9" * 10**6, b"0x1", b"", b"1_0", b"1.5", b"--1")),
        HEADER + b"\xff\t\xfe\t1\n",
        HEADER + b"q999\td999\tx\n" * 30_000,
    ):  # fmt: skip
        (sound / "qrels" / "test.tsv").write_bytes(text)
        yield sound
