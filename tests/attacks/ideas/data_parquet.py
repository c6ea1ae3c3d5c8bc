"""A few kilobytes of Parquet that are millions of rows, or gigabytes of one text."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet

READER = "data"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    made = {
        "rows": {"question": ["x"] * 10**6, "answer": ["y"] * 10**6},
        "text": {"question": ["x" * (1 << 20)] * 40, "answer": ["y"] * 40},
        "pages": {"question": ["x" * (40 << 20)], "answer": ["y"]},
    }
    for name, columns in made.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet", compression="zstd")
        yield folder / f"{name}.parquet"
    (folder / "cut.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    yield folder / "cut.parquet"
