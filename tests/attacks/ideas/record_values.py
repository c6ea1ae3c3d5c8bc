"""A record with numbers that are none, and fields of other kinds."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "record"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for entries in (
        {"seeds": [10**400]},
        {"seeds": ["x"]},
        {"methods": []},
        {"budget": {"kind": "steps", "value": "x"}},
        {"title": 7},
        {"data": "x"},
        {"schema": 99},
        {"methods": {"lora": 7}},
    ):
        file = folder / "config.json"
        file.write_bytes((sound / "config.json").read_bytes())
        edited(file, **entries)
        made = folder / str(len(list(folder.iterdir())))
        made.mkdir()
        (made / "trials").mkdir()
        file.rename(made / "config.json")
        yield made
