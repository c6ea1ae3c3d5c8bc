"""Two tensors on the same bytes, bytes of no tensor, and tensors outside of the file."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import parts, safetensors

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    header, data = parts(sound)
    one, other = list(header)[1:3]
    begin, end = header[other]["data_offsets"]
    for i, offsets in enumerate(
        (header[one]["data_offsets"], [begin + 8, end + 8], [end, begin], [2**62, 2**62 + end - begin])
    ):
        yield safetensors(
            folder / f"{i}.safetensors", header | {other: header[other] | {"data_offsets": offsets}}, data
        )
    yield safetensors(folder / "gap.safetensors", header, data + bytes(64))
