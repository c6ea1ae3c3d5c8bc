"""A sparse mask whose positions lie outside of the matrix, twice at one place, or are no positions."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

import addenda as ad
from attacks.files import parts, safetensors
from attacks.readers import model
from shared import stir

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    on = model()
    file = stir(ad.attach(on, "sparse:count=4", targets="q_proj")).save(folder / "mask.safetensors")
    header, data = parts(file)
    name = next(k for k in header if k.endswith("/index"))
    begin, end = header[name]["data_offsets"]
    index = load_file(file)[name]
    most = torch.iinfo(index.dtype).max
    for i, positions in enumerate(([0, 1, 2, most], [-1, 0, 1, 2], [1, 1, 1, 1], [3, 2, 1, 0])):
        said = torch.tensor(positions, dtype=index.dtype).numpy().tobytes()
        yield safetensors(folder / f"{i}.safetensors", header, data[:begin] + said + data[end:])
