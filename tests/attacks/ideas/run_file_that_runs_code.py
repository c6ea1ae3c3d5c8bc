"""Options that let code run: they are said on the command line or not at all."""

from collections.abc import Iterator
from pathlib import Path

READER = "run_file"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for text in (
        "trust_remote_code: true",
        "trust-remote-code: yes",
        "config: other.yaml",
        "command: merge",
        "steps: __import__('os')",
        "steps: 1e400",
        "steps: " + "9" * 10**4,
    ):
        sound.write_text(text)
        yield sound
