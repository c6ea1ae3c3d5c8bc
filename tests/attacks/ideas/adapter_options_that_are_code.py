"""Options that would be run if anybody evaluated them, and methods that are modules."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import adapter, copied

READER = "adapter"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, text in enumerate(("__import__('os').system('id')", "{{7*7}}", "${HOME}", "os:system", "lambda: 0")):
        for change in ({"options": {"rank": text}}, {"name": text, "options": {}}, {"options": {text: 1}}):
            yield adapter(copied(sound, i), lambda own, change=change: own["methods"][0].update(change))
