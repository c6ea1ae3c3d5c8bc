"""Trials of methods that there are not, with verdicts that are none, and one that is two."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

READER = "record"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, entries in enumerate(
        (
            {"method": "../x"},
            {"method": "lora", "stage": "x"},
            {"status": 7},
            {"seed": 1.5},
            {"rate": "x"},
            {"test": {"accuracy": 7, "items": "01"}},
            {"test": {"accuracy": 0.5, "items": "<script>"}},
            {"losses": [[1]]},
        )
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        (made / "trials").mkdir(exist_ok=True)
        trial = {"method": "lora", "stage": "final", "status": "ok", "seed": 0, "rate": 0.001, "steps": 4} | entries
        (made / "trials" / "x.json").write_text(json.dumps(trial))
        yield made
