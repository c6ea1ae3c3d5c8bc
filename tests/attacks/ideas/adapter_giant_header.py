"""Twenty bytes that claim a header of 90 MB, and eight that claim 2^63."""

import struct
from collections.abc import Iterator
from pathlib import Path

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, claim in enumerate((90 << 20, 2**31, 2**63, 2**64 - 1)):
        file = folder / f"{i}.safetensors"
        file.write_bytes(struct.pack("<Q", claim) + b"{}" * 6)
        yield file
