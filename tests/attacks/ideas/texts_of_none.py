"""A language without a text: files of nothing, of line ends, of bytes that are no text, of one endless line."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import written

READER = "texts"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, data in enumerate((b"", b"\n" * 10**6, b" \t\n \n", b"\xff\xfe\n", "text\n".encode("utf-16"))):
        yield written(folder / f"{i}.txt", data)
    (folder / "empty").mkdir()
    yield folder / "empty"
    yield folder / "none.txt"
