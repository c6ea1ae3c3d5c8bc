"""A line of a gigabyte, most of it a hole in the file; a pipe; a folder; a link to itself."""

import os
from collections.abc import Iterator
from pathlib import Path

READER = "trec"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for suffix in ("run", "qrels"):
        with (folder / f"long.{suffix}").open("wb") as f:
            f.write(b"q0 ")
            f.truncate(1 << 30)
        yield folder / f"long.{suffix}"
        os.mkfifo(folder / f"pipe.{suffix}")
        yield folder / f"pipe.{suffix}"
        (folder / f"folder.{suffix}").mkdir()
        yield folder / f"folder.{suffix}"
        (folder / f"link.{suffix}").symlink_to(folder / f"link.{suffix}")
        yield folder / f"link.{suffix}"
