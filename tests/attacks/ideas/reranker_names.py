"""A composition that names an adapter twice, one that is not there, and names that are paths."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import edited

READER = "reranker"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    file = sound / "reranker.json"
    good, digest = file.read_text(), {"sha256": "0" * 64}
    for entry in (
        {"composition": {"stack": ["de", "de"]}},
        {"composition": {"stack": ["de", {"average": ["de", "task"], "weights": [0.5, 0.5]}]}},
        {"composition": {"stack": ["de", {"split": ["de", "task"], "by": "separator:2"}]}},
        {"composition": {"stack": ["de"]}},
        {"composition": {"stack": ["de", "task", "fi"]}},
        {"composition": {"stack": ["de", None]}},
        {"adapters": {}},
        {"adapters": {"../../de": digest, "task": digest}},
        {"adapters": {"/etc/passwd": digest}},
        {"adapters": {"\u001b[2J": digest}},
        {"adapters": {f"a{i}": digest for i in range(10_000)}},
        {"adapters": ["de", "task"]},
    ):
        file.write_text(good)
        edited(file, **entry)
        yield sound
