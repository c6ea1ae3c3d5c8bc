"""Weights of shapes without bytes, on one another's bytes, or outside of the file."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "weights"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    header, data = parts(sound / "model.safetensors")
    one, other = [k for k in header if k != "__metadata__"][:2]
    for i, entry in enumerate(
        (
            {"shape": [2**62]},
            {"shape": [2**31, 2**31, 4]},
            {"data_offsets": header[one]["data_offsets"]},
            {"data_offsets": [2**62, 2**62 + 4]},
            {"dtype": "F7"},
            {"shape": [-1]},
            {"shape": "x"},
            {"data_offsets": [0]},
        )
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        safetensors(made / "model.safetensors", header | {other: header[other] | entry}, data)
        yield made
