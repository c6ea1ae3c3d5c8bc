"""A reranker whose files are not those that were written: swapped, cut, links, pickles; tokenizer and base too."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import Harm

READER = "reranker"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for change in (_swapped, _cut, _link, _gone, _pickle, _tokenizer, _cut_tokenizer, _no_tokenizer, _base, _no_base):
        made = folder / change.__name__
        shutil.copytree(sound, made)
        change(made)
        yield made


def _swapped(made: Path) -> None:
    shutil.copy(made / "adapters" / "de.safetensors", made / "adapters" / "task.safetensors")


def _cut(made: Path) -> None:
    file = made / "adapters" / "de.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _link(made: Path) -> None:
    file = made / "adapters" / "de.safetensors"
    file.rename(made / "elsewhere.safetensors")
    file.symlink_to(made / "elsewhere.safetensors")


def _gone(made: Path) -> None:
    shutil.rmtree(made / "adapters")


def _pickle(made: Path) -> None:
    for name in ("adapters/de.safetensors", "base/pytorch_model.bin"):
        (made / name).write_bytes(pickle.dumps(Harm()))


def _tokenizer(made: Path) -> None:
    file = made / "tokenizer" / "tokenizer.json"
    said = json.loads(file.read_text())
    words = said["model"]["vocab"]
    words["a1"], words["a2"] = words["a2"], words["a1"]
    file.write_text(json.dumps(said))


def _cut_tokenizer(made: Path) -> None:
    file = made / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-20])


def _no_tokenizer(made: Path) -> None:
    shutil.rmtree(made / "tokenizer")
    (made / "tokenizer").mkdir()


def _base(made: Path) -> None:
    file = made / "base" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _no_base(made: Path) -> None:
    shutil.rmtree(made / "base")
