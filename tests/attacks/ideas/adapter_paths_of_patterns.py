"""Names of sites that are globs and expressions, some of which never end."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import at_path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(("layers.*.self_attn.q_proj", "re:(a+)+$", "(.*.*)*x", "[", "layers.0.self_attn.?_proj")):
        yield at_path(sound, folder / f"{i}.safetensors", path)
