"""TREC's files, read and written: judgements (qrels) and runs, the answers of a system.

    qrels    query 0 document grade                 four columns, spaces or tabs between
    run      query Q0 document rank score tag       six; the rank is not read, as trec_eval does not

trec_eval orders documents of equal score by their ids, the last first, after it has rounded scores to float32 (MS
MARCO's program takes the first first). A run whose order counts must not leave that to them: `strict` makes scores
differ, and `write_run` writes no others.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, shown
from addenda.core.disk.whole import free_place, whole
from addenda.data.labels import writable
from addenda.ranking.beir import add_judgement, check_answers, check_grades
from addenda.ranking.collection import Collection, Qrels, Run, check_finite
from addenda.ranking.lines import Faults, numbered, quoted

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LARGEST = float(np.finfo(np.float32).max)


def read_qrels(path: str | Path, collection: Collection | None = None) -> Qrels:
    """Return judgements of TREC's format. collection: what they must be of.

    Raises AddendaError, by line, for another number of columns, a grade that is no whole number, a pair that is judged
    twice, a query without an answer, and what is not in the collection.
    """
    path = path_of(path)
    qrels: dict[str, dict[str, int]] = {}
    first, faults = {}, Faults(path)
    known = _Known(collection, faults)
    for number, line in numbered(path):
        columns = line.split()
        if len(columns) != 4:
            faults.add(number, f"{len(columns)} columns, 4 were expected (query 0 document grade)")
            continue
        query, _, document, grade = columns
        first.setdefault(query, number)
        add_judgement(qrels, query, document, grade, number, faults)
        known.check(query, document, number)
    check_answers(qrels, first, faults)
    known.close()
    faults.check("Mend or remove these lines.")
    if not qrels:
        raise AddendaError(f"{shown(path)} holds no judgement. A line is: query 0 document grade.")
    return qrels


def read_run(path: str | Path, collection: Collection | None = None) -> Run:
    """Return a system's answers, each query's from the best score on. collection: what they must be of.

    Equal scores keep the order of the file. Raises AddendaError, by line, for another number of columns, a score that
    is no finite number, a document that is there twice for a query, and what is not in the collection.
    """
    path = path_of(path)
    run: dict[str, dict[str, float]] = {}
    faults = Faults(path)
    known = _Known(collection, faults)
    for number, line in numbered(path):
        columns = line.split()
        if len(columns) != 6:
            faults.add(number, f"{len(columns)} columns, 6 were expected (query Q0 document rank score tag)")
            continue
        query, _, document, _, score, _ = columns
        value = float(score) if _NUMBER.fullmatch(score) else math.nan
        if not math.isfinite(value):
            faults.add(number, f"the score {quoted(score)} is no finite number")
        if document in run.setdefault(query, {}):
            faults.add(number, f"document {quoted(document)} is there twice for query {quoted(query)}")
        run[query][document] = value
        known.check(query, document, number)
    known.close()
    faults.check("Mend or remove these lines.")
    if not run:
        raise AddendaError(f"{shown(path)} holds no answer. A line is: query Q0 document rank score tag.")
    return {query: _ranked(scores) for query, scores in run.items()}


def write_qrels(qrels: Qrels, path: str | Path) -> Path:
    """Write judgements, whole or not at all, where nothing is yet; return the path. Raises AddendaError."""
    out = free_place(path, "path")
    _check_words((q for q in qrels), (d for graded in qrels.values() for d in graded))
    check_grades(qrels)
    rows = (f"{q} 0 {d} {int(grade)}" for q, graded in qrels.items() for d, grade in graded.items())
    _write(out, rows)
    return out


def write_run(run: Run, path: str | Path, *, tag: str = "addenda") -> Path:
    """Write a system's answers, scores strictly decreasing (`strict`); return the path. tag: the system's name.

    Whole or not at all, where nothing is yet. Raises AddendaError for scores that are not finite, and for ids or a tag
    with white space in them, which would be another column.
    """
    out = free_place(path, "path")
    _check_words(run, (d for scores in run.values() for d in scores), [tag])
    ordered = strict(run)
    rows = (f"{q} Q0 {d} {rank} {score:.9g} {tag}" for q, scores in ordered.items()
            for rank, (d, score) in enumerate(scores.items(), 1))  # fmt: skip
    _write(out, rows)
    return out


def strict(run: Run) -> dict[str, dict[str, float]]:
    """Return the run with each query's documents from the best on and scores that differ as float32 numbers.

    Equal scores keep the order in which they are given. A score that is not below the one before it becomes the next
    smaller number; where there is none, the query's scores are its ranks from behind.
    Raises AddendaError for a score that is not finite.
    """
    check_finite(run)
    return {query: _strict(_ranked(scores)) for query, scores in run.items()}


def _ranked(scores: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))  # stable: equal ones stay in their order


def _strict(scores: Mapping[str, float]) -> dict[str, float]:
    found, below, lowest = {}, np.float32(np.inf), np.float32(-np.inf)
    with np.errstate(all="ignore"):
        for document, score in scores.items():
            near = np.float32(min(max(score, -_LARGEST), _LARGEST))
            below = min(near, np.nextafter(below, lowest))
            found[document] = float(below)
    if below == lowest:
        return {document: float(len(found) - rank) for rank, document in enumerate(found)}
    return found


class _Known:
    """Which queries and documents there are, and whether a file is of another collection altogether."""

    def __init__(self, collection: Collection | None, faults: Faults):
        self.collection, self.faults, self.seen, self.lost = collection, faults, 0, 0

    def check(self, query: str, document: str, number: int) -> None:
        if self.collection is None:
            return
        unknown = [f"query {quoted(query)}"] * (query not in self.collection.queries)
        unknown += [f"document {quoted(document)}"] * (document not in self.collection.documents)
        self.seen, self.lost = self.seen + 1, self.lost + bool(unknown)
        if unknown:
            self.faults.add(number, f"{' and '.join(unknown)} not in {self.collection.name}")

    def close(self) -> None:
        """Raise AddendaError where no line is of the collection."""
        if self.collection is not None and self.seen and self.lost == self.seen:
            self.faults.check(f"It is of another collection than {self.collection.name}: none of its lines is of this.")


def _check_words(*of: Iterable[str]) -> None:
    word: Callable[[str], bool] = lambda text: writable(text) and text.split() == [text]  # noqa: E731
    bad = next((text for texts in of for text in texts if not word(text)), None)
    if bad is not None:
        raise AddendaError(
            f"{quoted(bad)} cannot be written in TREC's format, whose columns are words: an id or tag is not empty and "
            "has no white space. Give it another id."
        )


def _write(out: Path, rows: Iterable[str]) -> None:
    with whole(out, folder=False) as place, place.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{row}\n" for row in rows)
