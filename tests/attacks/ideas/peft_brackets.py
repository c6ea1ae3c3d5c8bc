"""A configuration of PEFT that is nested too deeply, one of 200 MB, and one that is no object."""

from collections.abc import Iterator
from pathlib import Path

READER = "peft"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, text in enumerate(("[" * 100_000, '{"a":' * 100_000, "[]", "null", "x" * (1 << 23), "")):
        made = folder / str(i)
        made.mkdir()
        (made / "adapter_model.safetensors").write_bytes((sound / "adapter_model.safetensors").read_bytes())
        (made / "adapter_config.json").write_text(text)
        yield made
