"""Patterns of ranks that are expressions which take for ever on a long name."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "peft"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for key in ("rank_pattern", "alpha_pattern"):
        yield edited(sound / "adapter_config.json", **{key: {"(.*.*.*.*.*)*x": 7, "(a+)+$": 3}, "r": 3}).parent
