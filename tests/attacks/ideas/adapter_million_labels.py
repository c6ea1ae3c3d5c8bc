"""A million labels, and labels that are one."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, labels in enumerate(
        ([str(n) for n in range(500_000)], ["a"] * 4, [""], [1, 2, 3, 4], {"a": 1}, ["a" * 10**6])
    ):
        yield adapter(copied(sound, i), lambda own, labels=labels: own.update(labels=labels))
