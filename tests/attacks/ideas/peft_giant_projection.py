"""VeRA's projections, which are in no file, told to be of a terabyte."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "peft"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    yield edited(
        sound / "adapter_config.json", peft_type="VERA", r=2**31, projection_prng_key=0, save_projection=False
    ).parent
