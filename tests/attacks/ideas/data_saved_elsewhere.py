"""A folder of datasets that names files outside of it, addresses, and a million classes."""

import json
from collections.abc import Iterator
from pathlib import Path

READER = "data"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    made = folder / "saved"
    made.mkdir()
    for name in ("../x.arrow", "/etc/passwd", "https://127.0.0.1:9/x.arrow", "", None):
        (made / "dataset_info.json").write_text("{}")
        (made / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        yield made
    (made / "state.json").write_text("[" * 100_000)
    yield made
    (made / "state.json").write_text('{"_data_files": []}')
    (made / "dataset_info.json").write_text('{"features": {"a": {"num_classes": 1000000000, "_type": "ClassLabel"}}}')
    yield made
