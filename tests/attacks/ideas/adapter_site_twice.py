"""One site twice, and ten thousand sites that are one."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for count in (2, 10_000):
        yield adapter(copied(sound, count), lambda own, count=count: own.update(sites=[own["sites"][0]] * count))
