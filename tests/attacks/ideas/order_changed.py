"""An adapter that orders images: cut, with a bit changed, of another kind, and a pickle."""

import pickle
from collections.abc import Iterator
from pathlib import Path

from attacks.files import Harm, copied, written

READER = "order"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    good = sound.read_bytes()
    for i, data in enumerate(
        (b"", good[:7], good[:-1], good + b"\0", b"\xff" * 8 + good[8:], good.replace(b"how many", b"how meny"),
         b"PK\3\4", pickle.dumps(Harm()), good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    ):  # fmt: skip
        yield written(copied(sound, i), data)
