"""A thousand methods in one file, each told to make a start of its own, and none used."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for count in (1000, 5_000):
        yield adapter(copied(sound, count), lambda own, count=count: own.update(methods=own["methods"] * count))
