"""What synthetic inputs hold of real ones, how alike two models answer, and how much of a gap a transfer closed.

leakage(made, seeds)                 # which made inputs are, or nearly are, a known one
agreement(student, teacher)          # share of equal answers
gap_recovered(transferred, base, real)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.ranges import Range
from addenda.data.task import normalised
from addenda.transferring.formats import pieces

GAP = 1e-9  # below it there is nothing to recover


@dataclass(frozen=True)
class Leakage:
    """Which of `count` made texts are known ones: (made, known) positions, exact up to case and spacing, and near.

    near: a made text that holds at least `share` of the n-grams of words that this known text has and no other one.
    widest: the largest such share of any made text that is no exact copy.
    """

    count: int
    exact: tuple[tuple[int, int], ...]
    near: tuple[tuple[int, int], ...]
    widest: float
    n: int
    share: float

    @property
    def rate(self) -> float:
        """The share of the made texts that are a known one, exactly or nearly."""
        return (len(self.exact) + len(self.near)) / self.count if self.count else 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.exact)} of {self.count:,} are known texts, {len(self.near)} have {self.share:.0%} or more of "
            f"the {self.n}-grams that only one known text has (the most: {self.widest:.0%})"
        )


@checked(special={"n": Range(1, 100, whole=True), "share": Range(0, 1, above=True)})
def leakage(made: Sequence[str], known: Sequence[str], *, n: int = 3, share: float = 0.5) -> Leakage:
    """Return which made texts are copies of known ones. Words are numbers too; signs and space between them are none.

    What many known texts share (their frame, a common instruction) tells nothing of one of them, so near copies are
    told by what a known text has alone; one that has nothing alone is found by exact copies only. Of known texts that
    are equal the first stands for all.
    """
    places = {normalised(text): j for j, text in reversed(list(enumerate(known)))}
    holders: dict[tuple[str, ...], list[int]] = {}
    for j in places.values():
        for gram in _grams(known[j], n):
            holders.setdefault(gram, []).append(j)
    own = Counter(js[0] for js in holders.values() if len(js) == 1)
    exact, near, widest = [], [], 0.0
    for i, text in enumerate(made):
        if (j := places.get(normalised(text))) is not None:
            exact.append((i, j))
            continue
        found = Counter(js[0] for gram in _grams(text, n) if len(js := holders.get(gram, [])) == 1)
        if not found:
            continue
        part, j = max((count / own[j], -j) for j, count in found.items())
        widest = max(widest, part)
        if part >= share:
            near.append((i, -j))
    return Leakage(len(made), tuple(exact), tuple(near), widest, n, share)


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = [p.casefold() for p in pieces(text) if p[-1].isalnum()]
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def agreement(student: Sequence[str], teacher: Sequence[str]) -> float:
    """Return the share of answers that are equal, up to space around them. Raises AddendaError for other numbers."""
    if len(student) != len(teacher) or not len(student):
        raise AddendaError(
            f"Answers are compared one by one: {len(student)} of the student, {len(teacher)} of the other."
        )
    return sum(a.strip() == b.strip() for a, b in zip(student, teacher, strict=True)) / len(student)


def gap_recovered(transferred: float, base: float, real: float) -> float | None:
    """Return g = (transferred − base) / (real − base), of accuracies: 1 where a transfer is as good as real data.

    base: the target without an adapter; real: the target trained on real labels. None where real data gains nothing.
    Raises AddendaError for what is no share.
    """
    for name, value in (("transferred", transferred), ("base", base), ("real", real)):
        if not (isfinite(value) and 0 <= value <= 1):
            raise AddendaError(f"{name} is an accuracy from 0 to 1, got {value!r}.")
    return (transferred - base) / (real - base) if real - base > GAP else None
