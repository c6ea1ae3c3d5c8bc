"""Aliases of aliases, nine to the ninth of one text."""

import itertools
from pathlib import Path

READER = "run_file"


def make(sound: Path, folder: Path) -> Path:
    lines = ['a: &a ["x","x","x","x","x","x","x","x","x"]']
    lines += [f"{n}: &{n} [{','.join(['*' + p] * 9)}]" for p, n in itertools.pairwise("abcdefghi")]
    sound.write_text("\n".join(lines))
    return sound
