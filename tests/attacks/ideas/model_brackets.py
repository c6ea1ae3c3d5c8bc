"""JSON files of a model that are nested too deeply, not JSON, or of 20 MB."""

import shutil
from collections.abc import Iterator
from pathlib import Path

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, name in enumerate(("config.json", "tokenizer.json", "tokenizer_config.json")):
        for j, text in enumerate(("[" * 100_000, '{"a":' * 100_000, "[]", "\0")):
            made = folder / f"{i}{j}"
            shutil.copytree(sound, made)
            (made / name).write_text(text)
            yield made
    (sound / "config.json").write_text('{"a":"' + "x" * (20 << 20) + '"}')
    yield sound
