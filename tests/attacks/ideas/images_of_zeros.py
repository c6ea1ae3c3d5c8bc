"""A gzipped array that claims gigabytes, and one that holds them."""

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

READER = "images"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, (shape, count) in enumerate(
        (((2**31, 2**10, 2**10), 10), ((60_000, 28, 28), 10), ((1000, 200, 200), 40_000_000))
    ):
        made = folder / str(i)
        made.mkdir()
        head = bytes((0, 0, 8, 3)) + struct.pack(">III", *shape)
        (made / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(count), 6))
        (made / "train-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", 10) + bytes(10))
        )
        yield made
