"""A configuration of a thousand million labels, each of which would be named."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, entries in enumerate(
        ({"num_labels": 10**9}, {"num_labels": 2**21, "architectures": ["LlamaForSequenceClassification"]})
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        yield edited(made / "config.json", **entries).parent
