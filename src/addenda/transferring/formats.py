"""The format of a task's inputs, by which a made line is taken or dropped before anybody judges it.

    format_of(r"Sort (ascending|descending): -?\\d+ -?\\d+ -?\\d+", seeds)   # the user's expression, of the whole line
    format_of(str.isupper, seeds)                                         # the user's function
    format_of(None, seeds)                                                # inferred from the seeds, and nothing else

What is inferred: a line is cut into numbers, words, white space and single other characters. It must begin and end with
the pieces that all seeds begin and end with. Where all seeds are alike up to the texts of their numbers and words, it
must be so too; else no two kinds of piece may stand side by side that do not in a seed. Where seeds have one of a few
words behind their common beginning (half as many as there are seeds, or fewer), it has one of those. Its length is from
half of the shortest seed's to twice the longest's, and letters beyond ASCII are there only where a seed has one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label

Accepts = Callable[[str], object]
_PIECE = re.compile(r"(?<![\w)\]])[-+]?\d+(?:[.,]\d+)*|[^\W\d_]+|\d+|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """A check of lines. said: what it is, in words for a report."""

    accepts: Accepts
    said: str

    def __call__(self, line: str) -> bool:
        """Return whether a line is of the format. Raises AddendaError where the user's function fails at it."""
        try:
            return bool(self.accepts(line))
        except Exception as error:
            raise AddendaError(
                f"The function given as format= fails at the line {label(line, 120)!r}: {type(error).__name__}: "
                f"{label(error, 200)}. It is given one line of text and returns whether that is an input of the task."
            ) from error


def format_of(given: str | re.Pattern | Accepts | Format | None, seeds: Sequence[str]) -> Format:
    """Return the check of a task's inputs: an expression for the whole line, a function, or what the seeds show.

    Raises AddendaError for an expression that cannot be read, and a check that refuses one of the seeds.
    """
    if isinstance(given, Format):
        made = given
    elif given is None:
        made = inferred(seeds)
    elif isinstance(given, str | re.Pattern):
        try:
            expression = re.compile(given)
        except re.error as error:
            raise AddendaError(f"format={label(given, 120)!r} is no regular expression: {error}.") from None
        made = Format(expression.fullmatch, f"the expression {expression.pattern}")
    elif callable(given):
        made = Format(given, f"the function {getattr(given, '__name__', type(given).__name__)}")
    else:
        raise AddendaError(
            f"format= is a regular expression, a function or None (as the seeds are), got {type(given).__name__}."
        )
    if refused := [s for s in seeds if not made(s)]:
        raise AddendaError(
            f"{made.said[0].upper()}{made.said[1:]} refuses {len(refused)} of the {len(seeds)} seeds, such as "
            f"{label(refused[0], 120)!r}, and the seeds are inputs of the task. Mend format=."
        )
    return made


def pieces(line: str) -> list[str]:
    """Return a line cut into numbers (with their sign), words, white space and single other characters."""
    return _PIECE.findall(line)


def inferred(seeds: Sequence[str]) -> Format:
    """Return the check that seeds alone allow; see the module."""
    cut = [pieces(s) for s in seeds]
    kinds = [list(map(_kind, row)) for row in cut]
    alike = len(set(map(tuple, kinds))) == 1
    start = _shared(cut)
    end = _shared([row[len(start) :][::-1] for row in cut])[::-1]
    follows = {pair for row in kinds for pair in pairwise(["start", *row, "end"])}
    choices = _choices(cut, kinds)
    shortest, longest = min(map(len, seeds)) // 2, max(map(len, seeds)) * 2
    ascii_only = all(s.isascii() for s in seeds)

    def accepts(line: str) -> bool:
        if not shortest <= len(line) <= longest or not line.isprintable() or (ascii_only and not line.isascii()):
            return False
        row = pieces(line)
        found = list(map(_kind, row))
        if row[: len(start)] != start or len(row) < len(start) + len(end) or row[len(row) - len(end) :] != end:
            return False
        if alike and found != kinds[0]:
            return False
        if not follows.issuperset(pairwise(["start", *found, "end"])):
            return False
        return all(at < len(row) and row[at] in words for at, words in choices.items())

    frame = " … ".join(repr("".join(p)) for p in (start, end) if p)
    return Format(
        accepts,
        "as the seeds are: "
        + ("all of one form" if alike else f"{len(follows)} pairs of kinds side by side")
        + (f", with {frame}" if frame else "")
        + f", {shortest} to {longest} characters",
    )


def _kind(piece: str) -> str:
    if piece[-1].isdigit():
        return "number"
    return "word" if piece.isalpha() else "space" if piece.isspace() else piece


def _shared(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the pieces that all rows begin with; not all of a row, so that something can vary."""
    columns = zip(*(row[: max(len(row) - 1, 0)] for row in rows), strict=False)
    return [column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns)]


def _choices(cut: Sequence[Sequence[str]], kinds: Sequence[Sequence[str]]) -> dict[int, set[str]]:
    """Return {place: its words} for places that have few, from the start to the first at which seeds differ freely."""
    found: dict[int, set[str]] = {}
    for at, (column, kind) in enumerate(zip(zip(*cut, strict=False), zip(*kinds, strict=False), strict=True)):
        words = set(column)
        if len(words) > 1 and (set(kind) != {"word"} or len(words) > len(cut) / 2):
            break
        if len(words) > 1:
            found[at] = words
    return found
