"""Tensors of 2^31 dimensions, of sides that have no product, and outside of the file."""

import struct
from collections.abc import Iterator
from pathlib import Path

from attacks.files import gguf, gguf_text

READER = "gguf"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    name = gguf_text("blk.0.attn_q.weight.lora_a")
    for i, (sizes, kind, offset) in enumerate(
        (
            ((2**63, 2), 0, 0),
            ((8, 2), 0, 2**63),
            ((8, 2), 0, 7),
            ((8, 2), 999, 0),
            ((0, 2), 0, 0),
            ((2**32, 2**32), 0, 0),
        )
    ):
        entry = (
            name
            + struct.pack("<I", len(sizes))
            + struct.pack(f"<{len(sizes)}Q", *sizes)
            + struct.pack("<IQ", kind, offset)
        )
        file = folder / f"{i}.gguf"
        file.write_bytes(gguf(tensors=entry, counts=(1, 0), data=bytes(256)))
        yield file
    file = folder / "dimensions.gguf"
    file.write_bytes(gguf(tensors=name + struct.pack("<I", 2**31), counts=(1, 0), data=bytes(256)))
    yield file
