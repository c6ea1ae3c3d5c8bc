"""Sites of other shapes and hashes than the model's: refused before a method looks at a weight."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, change in enumerate(({"hash": "0" * 64}, {"shape": [8, 16]}, {"dtype": "float64"}, {"kind": "conv2d"})):
        yield adapter(copied(sound, i), lambda own, change=change: own["sites"][0].update(change))
