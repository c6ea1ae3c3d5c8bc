"""Answers and judgements of queries and documents that are of another collection, in whole or in one line."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import written

READER = "trec"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    good = sound.read_bytes()
    for i, line in enumerate((b"z1 Q0 d0 1 2.5 x\n", b"q1 Q0 z0 1 2.5 x\n", b"\x1b[2J Q0 \xe2\x80\xae 1 2.5 x\n")):
        yield written(folder / f"one{i}.run", good + line)
        yield written(folder / f"all{i}.run", line)
    yield written(folder / "many.run", b"".join(b"z%d Q0 z0 1 2.5 x\n" % i for i in range(30_000)))
    yield written(folder / "one.qrels", b"q0 0 d0 1\nz1 0 d0 1\n")
