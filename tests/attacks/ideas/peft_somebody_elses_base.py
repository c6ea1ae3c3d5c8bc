"""A base that is an address, and code to load it with: neither is looked at, and the adapter is read."""

from pathlib import Path

from attacks.files import edited

READER = "peft"
READ = True


def make(sound: Path, folder: Path) -> Path:
    return edited(
        sound / "adapter_config.json",
        base_model_name_or_path="http://127.0.0.1:9/x",
        auto_mapping={"base_model_class": "system", "parent_library": "os"},
        revision="../..",
    ).parent
