"""A configuration of PEFT with ranks and scales that are none."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "peft"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for r in (2**31, 10**300, -1, 0, None, "8", [8], 1.5):
        yield edited(sound / "adapter_config.json", r=r).parent
