"""A collection of which files are missing, empty, folders, pipes, or links in a circle."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

READER = "beir"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels"):
        for change in (None, Path.touch, Path.mkdir, os.mkfifo, lambda p: p.symlink_to(p)):
            made = folder / "made"
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(sound, made)
            part = made / name
            shutil.rmtree(part) if part.is_dir() else part.unlink()
            if name == "qrels/test.tsv":
                for other in ("train", "dev"):
                    (made / "qrels" / f"{other}.tsv").unlink()
            if change is not None:
                change(part)
            yield made
