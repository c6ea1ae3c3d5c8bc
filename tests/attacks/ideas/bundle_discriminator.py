"""A bundle whose digest is right, and whose discriminator is a pickle, a giant, another kind of file, or nothing."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from addenda.core.file.container import DIGITS, sound, write
from addenda.transferring import bundle
from attacks.files import Harm, copied

READER = "bundle"


def make(path: Path, folder: Path) -> Iterator[Path]:
    with sound(path) as file:
        about, tensors = json.loads(file.metadata["bundle"]), file.tensors()
    good = tensors["discriminator"].numpy().tobytes()
    header = b'{"__metadata__":{"addenda":"{}"},"x":{"dtype":"F32","shape":[281474976710655],"data_offsets":[0,4]}}'
    giant = len(header).to_bytes(8, "little") + header + b"\0" * 4
    text = json.dumps(about | {"sha256": "0" * DIGITS}, ensure_ascii=False, separators=(",", ":"))
    files = (b"", pickle.dumps(Harm()), good[:-1], giant, path.read_bytes(), (1 << 62).to_bytes(8, "little") + good[8:])
    for i, data in enumerate(files):
        place = copied(path, i)
        write(place, {"bundle": text}, {"discriminator": torch.tensor(list(data), dtype=torch.uint8)}, bundle._BEFORE)
        yield place
    for i, changes in enumerate(({"seeds": ["a"] * 2}, {"count": 10**30}, {"made": []}, {"judge": {}}), len(files)):
        place = copied(path, i)
        text = json.dumps(about | {"sha256": "0" * DIGITS} | changes, ensure_ascii=False, separators=(",", ":"))
        write(place, {"bundle": text}, tensors, bundle._BEFORE)
        yield place
