"""A collection to be searched: queries, documents, and which document answers which query (BEIR's three files)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Qrels = Mapping[str, Mapping[str, int]]  # {query: {document: grade}}; 0 is judged and irrelevant, absent is unjudged
Run = Mapping[str, Mapping[str, float]]  # {query: {document: score}}, the higher the better; a system's answers


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
    the same and are therefore never its negatives.
    """

    name: str
    queries: Mapping[str, str]
    documents: Mapping[str, Document]
    qrels: Mapping[str, Qrels] = field(default_factory=dict)  # {"train": …, "dev": …, "test": …}
    language: str | None = None
    query_language: str | None = None
    near: Mapping[str, frozenset[str]] = field(default_factory=dict)
