"""Lines of other columns, of a million of them, and documents that are there twice."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import written

READER = "trec"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    good = b"q0 Q0 d0 1 2.5 x\n"
    for i, text in enumerate(
        (b"", b"\n \n", good[:-3], good + good, b"x " * 10**6, b"q0 Q0 d0 1 2.5 x y\n", b"\0" * 1000, good * 30_000,
         "q0 Q0 d0 1 2.5 x\n".encode("utf-16"))
    ):  # fmt: skip
        yield written(folder / f"{i}.run", text)
    for i, text in enumerate((b"", b"q0 0 d0\n", b"q0 0 d0 1\nq0 0 d0 2\n", b"q0 0 d0 0\n", b"q0 0 d0 1 1\n")):
        yield written(folder / f"{i}.qrels", text)
