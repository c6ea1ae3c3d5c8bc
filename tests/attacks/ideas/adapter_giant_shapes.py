"""Tensors that claim 2^62 numbers, more than there are numbers for, and none of a giant."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    header, data = parts(sound)
    name = list(header)[1]
    for i, shape in enumerate(
        ([2**62], [2**31, 2**31, 4], [2**63, 2], [0, 2**47], [2**40, 0], [-1, -8], [True, 8], [8.0])
    ):
        yield safetensors(folder / f"{i}.safetensors", header | {name: header[name] | {"shape": shape}}, data)
