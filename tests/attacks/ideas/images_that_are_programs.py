"""PostScript, a pickle and markup under the name of an image."""

from collections.abc import Iterator
from pathlib import Path

READER = "images"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    made = sound / "cat" / "x.png"
    for data in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n",
        b"\x80\x04N.",
        b"<svg/>",
        b"",
        b"GIF89a",
    ):
        made.write_bytes(data)
        yield sound
