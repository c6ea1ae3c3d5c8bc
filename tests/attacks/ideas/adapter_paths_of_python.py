"""Names of sites that are attributes of every object."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import at_path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, path in enumerate(
        ("__class__", "layers.0.__class__", "forward", "layers.0.self_attn.q_proj.__init__", "_modules", "")
    ):
        yield at_path(sound, folder / f"{i}.safetensors", path)
