"""A head that claims more than the file holds, for whoever makes room for it."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, shape in enumerate(([10**8, 32], [2**39, 2**39], [5], [], [10**8, 8])):
        yield adapter(copied(sound, i), lambda own, shape=shape: own["sites"][-1].update(shape=shape))
