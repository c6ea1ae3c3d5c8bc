"""NaN, Infinity and 1e400 where numbers are meant, which Python's JSON takes."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied, parts

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    text = parts(sound)[0]["__metadata__"]["addenda"]
    for i, value in enumerate(("NaN", "Infinity", "-Infinity", "1e400")):
        for there in ('"step": 0', '"seed": 0', '"rank": 2', '"dropout": 0.0', '"sample": ['):
            if there not in text:
                continue
            broken = text.replace(
                there,
                (there if there.endswith("[") else there[: there.index(":") + 2])
                + value
                + ("," if there.endswith("[") else ""),
                1,
            )
            yield adapter(copied(sound, i), lambda _, broken=broken: broken)
