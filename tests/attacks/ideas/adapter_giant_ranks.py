"""Ranks and scales that no weight has."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, rank in enumerate((2**31, 2**62, 10**300, -1, 0, 1e300, "2", [2], None, True, {"rank": 2})):
        yield adapter(copied(sound, i), lambda own, rank=rank: own["methods"][0]["options"].update(rank=rank))
