"""Methods whose random tensors are in no file, told to make them of a terabyte."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name, option in (
        ("vera", "rank"),
        ("nola", "basis"),
        ("randlora", "rank"),
        ("fourierft", "frequencies"),
        ("vb-lora", "vectors"),
        ("tied-lora", "rank"),
    ):
        for value in (10**6, 2**31, 2**40):
            entry = {"name": name, "options": {option: value}}
            yield adapter(copied(sound, name), lambda own, entry=entry: own.update(methods=[entry]))
