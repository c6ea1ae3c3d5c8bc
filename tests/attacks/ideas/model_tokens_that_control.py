"""Options of added tokens whose names hold what controls a terminal: tokenizers prints those that it does not know."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

READER = "model"
ODD = {"\x1b]0;owned\x07": 1}, {"\x9b31m": 1}, {"x" * 100_000: 1}, {"lstrip": False, "‮": 1}


def make(sound: Path, folder: Path) -> Iterator[Path]:
    token = {"content": "<odd>", "lstrip": False}
    for i, odd in enumerate(ODD):
        for j, (name, entries) in enumerate({
            "tokenizer_config.json": {"added_tokens_decoder": {"5": token | odd}},
            "special_tokens_map.json": {"mask_token": token | odd, "extra_special_tokens": [odd]},
            "tokenizer.json": {"added_tokens": [{"id": 5, "special": True, **token, **odd}]},
        }.items()):  # fmt: skip
            made = folder / f"{i}{j}"
            shutil.copytree(sound, made)
            file = made / name
            file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | entries))
            yield made
