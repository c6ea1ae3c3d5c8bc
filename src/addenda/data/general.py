"""A general text, cut into windows: how well a model still predicts what it was not trained on.

Unless a file is named it is what every machine has: docstrings of Python's standard library, read from the source
without importing anything, in an order by hash. Most of them stay from version to version of Python and some do not, so
whoever keeps a loss keeps `sha256` and `python` with it. Where the training data holds these docstrings, the topics of
Python's `help()` take their place.
"""

import ast
import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import reading
from addenda.data.encode import Tokens, start_ids
from addenda.data.encoded import IGNORE, Encoded
from addenda.data.limits import within

WINDOWS, LENGTH = 32, 128  # at most so many windows of so many tokens
LEAST = 8  # windows, below which an interval says little
CHARACTERS = 40_000  # of text, which are enough for them in any alphabet
SHORT, LONG = 200, 2000  # characters of a docstring that is taken
RUN = 16  # tokens in a row that a text and the training data have in common by copying only
LOOKED_AT = 5000  # first examples of the training data that are searched for such runs
COPIED = 0.1  # of the windows with such a run: the data holds the text
DOCSTRINGS, TOPICS = "docstrings of Python's library", "topics of Python's help()"


@dataclass(frozen=True)
class General:
    """A general text as a model reads it. name: what it is; sha256: of the text; python: whose it is, if Python's."""

    windows: Tokens
    name: str
    sha256: str
    python: str | None = None


def general(text: str | Path, tokenizer: Any, model: nn.Module, train: Encoded) -> General | None:
    """Return the windows of a text. text: a file, or "auto" for Python's docstrings, or topics where `train` has those.

    Every window is judged at all its tokens but the first. None where "auto" finds neither text in this Python, or the
    tokenizer knows too little of them. Raises AddendaError for a file that is no UTF-8 text or is too short.
    """
    length = within(LENGTH, model) or LENGTH
    if text != "auto":
        content = read_text(text)
        made = windows(content, tokenizer, length)
        if len(made) < LEAST:
            raise AddendaError(
                f"A general text has at least {LEAST} windows of {length} tokens; {text} has {len(made)}. Give a "
                "longer one as general=, or leave it out for Python's docstrings."
            )
        return General(made, Path(text).name, _sha256(content))
    for name, source in ((DOCSTRINGS, docstrings()), (TOPICS, topics())):
        made = windows(source, tokenizer, length)
        if len(made) >= LEAST and copied(made, train) < COPIED:
            return General(made, name, _sha256(source), platform.python_version())
    return None


def read_text(file: str | Path) -> str:
    """Return the beginning of a text file. Raises AddendaError where it cannot be read or is not UTF-8."""
    path = Path(file).expanduser()
    try:
        with reading(path), path.open(encoding="utf-8") as content:
            return content.read(CHARACTERS)
    except UnicodeDecodeError as error:
        raise AddendaError(
            f"general= is a text in UTF-8, and {file} is none: {error.reason} at {error.start}."
        ) from None


@lru_cache(maxsize=1)
def docstrings() -> str:
    """Return docstrings of the standard library's top modules, in an order by their hash; "" without its sources."""
    found = set()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(ast.get_docstring(node) or "")
    taken = [text for text in found if SHORT <= len(text) <= LONG]
    return "\n\n".join(sorted(taken, key=_sha256))[:CHARACTERS]


def topics() -> str:
    """Return the topics of `help()`, in an order by their hash; "" where this Python has none."""
    try:
        from pydoc_data.topics import topics as held  # some systems ship Python without it
    except ImportError:
        return ""
    return "\n\n".join(sorted(held.values(), key=_sha256))[:CHARACTERS]


def windows(text: str, tokenizer: Any, length: int = LENGTH, most: int = WINDOWS) -> Tokens:
    """Return the first windows of a text, `length` tokens each, each begun as the tokenizer begins a text."""
    start = start_ids(tokenizer)
    ids, own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], max(length - len(start), 1)
    rows = [list(ids[i * own : (i + 1) * own]) for i in range(min(len(ids) // own, most))]
    labels = [[IGNORE] * len(start) + row for row in rows]
    return Tokens([[*start, *row] for row in rows], labels, "causal", pad=0)


def copied(text: Tokens, train: Encoded) -> float:
    """Return the share of windows that have `RUN` tokens in a row in common with the training data's first examples."""
    if not isinstance(train, Tokens):
        return 0.0
    there = [_runs(row) for row in text.ids]  # of a short context none, and then nothing is known
    wanted = set().union(*there)
    found = {run for row in train.ids[:LOOKED_AT] for run in _runs(row) & wanted}
    return sum(not runs.isdisjoint(found) for runs in there) / len(text)


def _runs(row: list[int]) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + RUN]) for i in range(len(row) - RUN + 1)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
