"""Data in forms that can run code, or that want unpacking: none is opened."""

import pickle
from collections.abc import Iterator
from pathlib import Path

READER = "data"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name in ("x.pkl", "x.pt", "x.npy", "x.npz", "x.h5", "x.zip", "x.tar.gz", "x.py", "x.arrow", "x.xml", "x"):
        (folder / name).write_bytes(pickle.dumps(print))
        yield folder / name
