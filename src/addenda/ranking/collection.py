"""A collection to be searched: queries, documents, and which document answers which query (BEIR's three files)."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from addenda.core.base.errors import AddendaError, nearest
from addenda.data.labels import writable
from addenda.ranking.lines import TOLD, quoted

Qrels = Mapping[str, Mapping[str, int]]  # {query: {document: grade}}; 0 is judged and irrelevant, absent is unjudged
Run = Mapping[str, Mapping[str, float]]  # {query: {document: score}}, the higher the better; a system's answers
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Document:
    """A document. title: what stands before the text, where there is one."""

    text: str
    title: str = ""

    @property
    def whole(self) -> str:
        """Title and text, as a model reads them."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class Collection:
    """Queries and documents by id, with the judgements of each split.

    language, query_language: BCP 47 codes such as "de", where they are known. near: by document, those that say nearly
    the same and are therefore never its negatives. sections: by document, what it is about, where that is known.
    """

    name: str
    queries: Mapping[str, str]
    documents: Mapping[str, Document]
    qrels: Mapping[str, Qrels] = field(default_factory=dict)  # {"train": …, "dev": …, "test": …}
    language: str | None = None
    query_language: str | None = None
    near: Mapping[str, frozenset[str]] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)

    def split(self, name: str) -> Qrels:
        """Return the judgements of a split. Raises AddendaError for one that there is not."""
        if name not in self.qrels:
            known = ", ".join(map(repr, self.qrels)) or "none"
            raise AddendaError(f"{self.name} has no split {name!r}; it has {known}.{nearest(name, self.qrels)}")
        return self.qrels[name]

    def check(self) -> None:
        """Raise AddendaError, naming what to mend, for a collection that cannot be searched and judged.

        That is one without queries or documents, with an empty text, with judgements of unknown queries or documents or
        without an answer, with half a character, or with a document near to one that is not there.
        """
        faults = [what for what in ("queries", "documents") if not getattr(self, what)]
        faults = [f"there are no {what}" for what in faults]
        faults += [f"query {quoted(q)} is empty" for q, text in self.queries.items() if not text.strip()]
        faults += [f"document {quoted(d)} is empty" for d, of in self.documents.items() if not of.whole]
        texts = [*self.queries.items(), *((d, of.whole) for d, of in self.documents.items())]
        faults += [f"{quoted(i)} holds half of a surrogate pair, which is no character" for i, text in texts
                   if not writable(f"{i}{text}")]  # fmt: skip
        for split, qrels in self.qrels.items():
            faults += (f"{split}: {fault}" for fault in faults_of(qrels, self.queries, self.documents))
        others = {other for near in self.near.values() for other in near}
        lost = [d for d in (*self.near, *sorted(others), *self.sections) if d not in self.documents]
        faults += [f"document {quoted(d)} is near to others or has a section, and is not there" for d in lost]
        if faults:
            more = f"; … and {len(faults) - TOLD:,} more" if len(faults) > TOLD else ""
            raise AddendaError(
                f"The collection {self.name} cannot be searched: {'; '.join(faults[:TOLD])}{more}. Mend or leave these "
                "out."
            )

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with any text, judgement, neighbour or section."""
        whole = hashlib.sha256()
        for part in self._parts():
            whole.update(json.dumps(part, ensure_ascii=True, separators=(",", ":")).encode())
        return whole.hexdigest()[:16]

    def _parts(self) -> Iterable:
        yield [self.language, self.query_language]
        yield from (["query", q, self.queries[q]] for q in sorted(self.queries))
        yield from ([d, self.documents[d].title, self.documents[d].text] for d in sorted(self.documents))
        for split in sorted(self.qrels):
            yield from ([split, q, sorted(self.qrels[split][q].items())] for q in sorted(self.qrels[split]))
        yield from (["near", d, sorted(self.near[d])] for d in sorted(self.near))
        yield from (["section", d, self.sections[d]] for d in sorted(self.sections))


def faults_of(qrels: Qrels, queries: Iterable[str], documents: Iterable[str]) -> list[str]:
    """Return what is wrong with judgements: a query or document that is not there, a query that nothing answers."""
    queries, documents, faults = set(queries), set(documents), []
    for query, graded in qrels.items():
        if query not in queries:
            faults.append(f"query {quoted(query)} is judged and not there")
        faults += [f"document {quoted(d)} is judged for query {quoted(query)} and not there" for d in graded if
                   d not in documents]  # fmt: skip
        if not any(grade > 0 for grade in graded.values()):
            faults.append(f"query {quoted(query)} has no answer: no document is graded above 0")
    return faults


def check_finite(run: Run) -> None:
    """Raise AddendaError for a score that is not finite."""
    for query, scores in run.items():
        bad = next((d for d, score in scores.items() if not math.isfinite(score)), None)
        if bad is not None:
            raise AddendaError(
                f"Document {quoted(bad)} has the score {scores[bad]} for query {quoted(query)}, and a finite number is "
                "wanted. A model that gives such scores has diverged, or its weights are damaged."
            )
