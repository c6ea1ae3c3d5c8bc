"""A schema of another version, none, and an old one with the digest of a new one."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, schema in enumerate((1, 3, 0, -1, True, "2", None, 2.0, 10**30)):
        yield adapter(copied(sound, i), lambda own, schema=schema: own.update(schema=schema))
