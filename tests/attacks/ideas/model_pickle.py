"""A model whose weights are pickles only, whole, in shards and of other frameworks."""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import Harm

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    weights = sound / "model.safetensors"
    weights.rename(folder / "kept.safetensors")
    for name in (
        "pytorch_model.bin",
        "pytorch_model-00001-of-00001.bin",
        "model.pt",
        "consolidated.pth",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.ckpt",
        "adapter_model.bin",
    ):
        made = folder / name.replace(".", "-")
        shutil.copytree(sound, made)
        (made / name).write_bytes(pickle.dumps(Harm()))
        yield made
