"""A few kilobytes that are an image of a hundred million pixels, or of none."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import png

READER = "images"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, size in enumerate(((4000, 4000), (9000, 9000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (0, 0))):
        made = folder / str(i) / "cat"
        made.mkdir(parents=True)
        (made / "x.png").write_bytes(png(*size))
        yield made.parent
