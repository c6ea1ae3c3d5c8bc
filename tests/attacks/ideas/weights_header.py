"""Headers of the weights that are no header: brackets, millions of lists, a size that nobody has."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import safetensors

READER = "weights"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, header in enumerate((b"[" * 100_000, b'{"a":[' + b"[]," * 10_000_000 + b"0]}", b"null", b'{"a":1}')):
        made = folder / str(i)
        shutil.copytree(sound, made)
        safetensors(made / "model.safetensors", header)
        yield made
