"""A bundle: cut, with a bit changed, with another seed, of another kind, and a pickle."""

import pickle
from collections.abc import Iterator
from pathlib import Path

from attacks.files import Harm, copied, written

READER = "bundle"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    good = sound.read_bytes()
    for i, data in enumerate(
        (b"", good[:7], good[:-1], good + b"\0", b"\xff" * 8 + good[8:], good.replace(b"one plus", b"one pl\xc3\xbc"),
         b"PK\3\4", pickle.dumps(Harm()), good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    ):  # fmt: skip
        yield written(copied(sound, i), data)
