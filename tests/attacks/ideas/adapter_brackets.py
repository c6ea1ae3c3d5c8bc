"""A hundred thousand brackets that open and never close, as the header and as the entry in it."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    yield safetensors(folder / "a.safetensors", b"[" * 100_000)
    yield safetensors(folder / "b.safetensors", b'{"a":' * 100_000)
    for i, text in enumerate(("[" * 100_000, '{"a":' * 50_000)):
        yield adapter(copied(sound, i), lambda own, text=text: text)
