"""Code of the folder's own for configuration, model and tokenizer, which would run as it is loaded."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "model"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    (sound / "code.py").write_text("raise SystemExit('it ran')")
    for i, (name, kind, other) in enumerate(
        (
            ("config.json", "AutoConfig", {"model_type": "own"}),
            ("config.json", "AutoModelForCausalLM", {"model_type": "own"}),
            ("tokenizer_config.json", "AutoTokenizer", {"tokenizer_class": "Own"}),
        )
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        value = ["code.Own", "code.Own"] if kind == "AutoTokenizer" else "code.Own"
        yield edited(made / name, auto_map={kind: value}, **other).parent
