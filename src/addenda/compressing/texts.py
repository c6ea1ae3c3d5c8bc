"""Text for calibration and for judging: files cut into windows of tokens, no window in both.

Without a source it is the Python standard library of the running interpreter: the domain that LoRD was published for,
on every machine, and its files are many and different.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.disk.access import path_of
from addenda.data.rows import SUFFIXES, rows_of

COLUMNS = ("text", "content", "code", "question", "prompt")
_SHORTEST = 32  # tokens: less says little, and most of it without context


@dataclass(frozen=True)
class Windows:
    """Windows of text. ids: token ids, each row of at most `length`; source: where they are from."""

    rows: tuple[tuple[int, ...], ...]
    source: str
    pad: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Return batches of `size` rows, padded on the right, with the mask that says where."""
        padded = []
        for at in range(0, len(self.rows), size):
            rows = self.rows[at : at + size]
            longest = max(map(len, rows))
            ids = [[*row, *[self.pad] * (longest - len(row))] for row in rows]
            mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            padded.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
        return padded


def texts_of(source: str | Path | None) -> tuple[list[str], str]:
    """Return (documents, what they are): of a text file, a folder of them, rows of data, or the standard library.

    None, or "python" where nothing is called so, is the standard library.

    Raises AddendaError for a source that is missing, empty or not text.
    """
    source = source if source is None else path_of(source, "calibration")
    if source is None or (str(source) == "python" and not Path(source).exists()):
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in sorted(library.glob("*.py")) if p.stat().st_size > 4096]
        return _readable(files, "the standard library of Python"), "the standard library of Python"
    path = source
    if path.is_dir() and not (path / "dataset_info.json").exists():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return _readable(files, str(path)), str(path)
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        return _readable([path], str(path)), str(path)
    rows = rows_of(path)
    name = rows.name
    column = next((c for c in COLUMNS if rows and c in rows[0]), None)
    if column is None:
        raise AddendaError(
            f"{name} has no column of text: expected one of {', '.join(COLUMNS)}, found "
            f"{', '.join(map(str, rows[0])) if rows else 'no row'}. Rename it, or give a text file or a folder of them."
        )
    return [t for row in rows if isinstance(t := row[column], str) and t.strip()], name


def _readable(paths: Sequence[Path], name: str) -> list[str]:
    texts = []
    for path in paths:
        try:
            with path.open("rb") as f:
                if b"\0" in f.read(1024):  # a library or an archive, which may be large
                    continue
            texts.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise AddendaError(f"Expected text to calibrate with at {name}, found no readable file with any.")
    return texts


def windows(
    tokenizer, source: str | Path | None, samples: int, length: int, *, judge: int = 16, seed: int = 0
) -> tuple[Windows, Windows]:
    """Return (for calibration, for judging): windows of `length` tokens out of many documents, in turn.

    Judged is by documents that calibration does not see, where there are at least eight, else by the end of each.
    Raises AddendaError for text that is too short to give both.
    """
    if samples < 1 or length < 2 or judge < 1:
        raise AddendaError(
            f"samples and windows to judge by must be at least 1, length 2; got {samples, judge, length}."
        )
    texts, name = texts_of(source)
    order = np.argsort(Stream(seed, "windows").raw(len(texts)), kind="stable")
    texts = [texts[i] for i in order]
    if len(texts) >= 8:
        count = max(len(texts) // 8, 1)
        calibration, judging = texts[count:], texts[:count]
    else:
        calibration, judging = [t[: len(t) * 7 // 8] for t in texts], [t[len(t) * 7 // 8 :] for t in texts]
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    parts = [
        Windows(cut(tokenizer, part, n, length), name, pad) for part, n in ((calibration, samples), (judging, judge))
    ]
    if not all(p.rows for p in parts):
        raise AddendaError(f"{name} is too short: no {_SHORTEST} tokens for calibration and as many for judging.")
    return parts[0], parts[1]


def cut(tokenizer, texts: list[str], n: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Return up to n windows, the first of every text before the second of any."""
    rows: list[tuple[int, ...]] = []
    sources = [_windows_of(tokenizer, text, length) for text in texts]
    while sources and len(rows) < n:
        rest = []
        for windows in sources:
            if len(rows) < n and (row := next(windows, None)) is not None:
                rows.append(row)
                rest.append(windows)
        sources = rest
    return tuple(rows)


def _windows_of(tokenizer, text: str, length: int) -> Iterator[tuple[int, ...]]:
    """Yield a text's windows one after the other, and its last tokens where they are enough to say something."""
    reach, ids = 12 * length, []  # characters at a time, so that no long text is tokenised whole
    for at in range(0, len(text), reach):
        ids += tokenizer(text[at : at + reach], add_special_tokens=False, verbose=False)["input_ids"]
        while len(ids) >= length:
            yield tuple(ids[:length])
            ids = ids[length:]
    if len(ids) >= min(_SHORTEST, length):
        yield tuple(ids)
