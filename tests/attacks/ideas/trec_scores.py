"""Runs whose scores are no finite numbers, and judgements whose grades are no whole ones."""

from collections.abc import Iterator
from pathlib import Path

from attacks.files import written

READER = "trec"


def make(sound: Path, folder: Path) -> Iterator[Path]:
    for i, said in enumerate(
        (b"NaN", b"nan", b"inf", b"-inf", b"1e400", b"1_0", b"0x1p3", b"9" * 10**6, b"x", b"1e", b"\xff")
    ):
        yield written(folder / f"{i}.run", b"q0 Q0 d0 1 " + said + b" x\n")
        yield written(folder / f"{i}.qrels", b"q0 0 d0 " + said + b"\n")
