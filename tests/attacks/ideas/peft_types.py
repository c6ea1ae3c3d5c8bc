"""Types of PEFT that there are not, and ones that are names of Python."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "peft"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for kind in ("__class__", "os.system", "LORA\0", "", 7, None, "X" * 10**6, ["LORA"]):
        yield edited(sound / "adapter_config.json", peft_type=kind).parent
