"""An index of documents in one file, and search in it: a first stage finds some, a reranker puts them in order.

    build(collection, "index.safetensors", first="e5")
    index = SearchIndex.load("index.safetensors")
    index.search("a lightweight database", reranker, top_k=10)

The file holds the documents, and for a bi-encoder their vectors with the encoder's name and what decides its numbers;
BM25 counts words anew when it is read. It carries the digest of its content: what was changed is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import DiskError, parse_json, path_of, shown
from addenda.core.disk.whole import free_place
from addenda.core.file.container import bytes_of
from addenda.core.file.states import read_state, write_state
from addenda.ranking.bi_encoder import BiEncoder
from addenda.ranking.bm25 import Bm25
from addenda.ranking.collection import Collection, Document
from addenda.ranking.first_stage import Index, best
from addenda.ranking.reranker import Reranker, behind

FORMAT = "addenda search index 1"
BM25 = "bm25"


@dataclass(frozen=True)
class Hit:
    """A document that was found. score: the reranker's, or the first stage's where there is none."""

    id: str
    score: float
    document: Document


class SearchIndex:
    """Documents, and the first stage that finds some of them. first: "bm25", or the name or folder of a bi-encoder."""

    def __init__(self, documents: Mapping[str, Document], index: Index, first: str, name: str = ""):
        self.documents, self.index, self.first, self.name = documents, index, first, name
        self._ids = list(documents)

    @classmethod
    def load(cls, path: str | Path) -> "SearchIndex":
        """Read an index. Raises AddendaError for another file, one that was changed, or another encoder than then."""
        place = path_of(path, "index")
        if not place.exists():
            raise AddendaError(f"There is no file {shown(place)}. `addenda rerank index` writes one.")
        try:
            held = read_state(place)
        except DiskError:
            raise
        except AddendaError as error:
            raise AddendaError(f"{error} Make the index anew: addenda rerank index.") from None
        try:
            fine = held["format"] == FORMAT
            text, vectors = held["documents"], held.get("vectors")
            fine = fine and text.dtype == torch.uint8 and text.dim() == 1 and held["sha256"] == _digest(text, vectors)
            rows = parse_json(bytes_of(text).tobytes().decode("utf-8"), room=text.numel())
            documents = {i: Document(of, title) for i, title, of in rows}
            first, encoder, name = held["first"], held.get("encoder"), held["name"]
            fine = fine and all(isinstance(said, str) for row in (*rows, (first, name)) for said in row)
            fine = fine and len(documents) == len(rows) and (first == BM25) == (vectors is None)
            fine = fine and all(d.whole for d in documents.values())
            if vectors is not None:
                fine = fine and vectors.dtype == torch.float32 and vectors.dim() == 2 and len(vectors) == len(rows)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            fine = False
        if not fine:
            raise AddendaError(
                f"{shown(place)} is no search index, or it was damaged or changed. Make it anew: addenda rerank index."
            )
        texts = [d.whole for d in documents.values()]
        if first == BM25:
            return cls(documents, Bm25(texts), first, name)
        by = BiEncoder.load(first)
        if encoder != by.digest(texts):
            raise AddendaError(
                f"{shown(place)} was made with another encoder than the {first} that is here, or with a tokenizer that "
                "reads otherwise: its vectors have no meaning for this one. Make it anew: addenda rerank index."
            )
        by.vectors = vectors.numpy()
        return cls(documents, by, first, name)

    def search(self, query: str, reranker: Reranker | None = None, *, top_k: int = 10, depth: int = 50) -> list[Hit]:
        """Return the best documents for a query, the best first.

        depth: how many the reranker puts in order; those behind follow as the first stage has them, with lower scores.
        Raises AddendaError for an empty query, and as `Reranker.rank` does.
        """
        if not isinstance(query, str) or not query.strip():
            raise AddendaError("The query is empty. Say what is looked for.")
        (scores,) = self.index.scores([query])
        found = best(self._ids, np.asarray(scores), max(depth, top_k), above=0.0 if self.first == BM25 else None)
        if reranker is None or not found:
            return [Hit(i, s, self.documents[i]) for i, s in list(found.items())[:top_k]]
        ids = list(found)
        ranked = reranker.rank(query, {i: self.documents[i] for i in ids[:depth]}, top_k=min(top_k, depth))
        scores = dict(ranked) | behind(ranked[-1][1], ids[depth:top_k])
        return [Hit(i, score, self.documents[i]) for i, score in scores.items()]


def build(collection: Collection, out: str | Path, *, first: str = "e5") -> Path:
    """Index the documents of a collection in one file, where nothing is yet; return its path.

    first: "bm25", the name of an embedded encoder, or the folder of one. Raises AddendaError.
    """
    place = free_place(out, "out")
    texts = [d.whole for d in collection.documents.values()]
    empty = next((i for i, d in collection.documents.items() if not d.whole), None)
    if empty is not None or not texts:
        what = "holds no document" if empty is None else f"has an empty document, {empty!r}"
        raise AddendaError(f"{collection.name} {what}, so it cannot be searched. Mend it, or leave that out.")
    rows = [[i, d.title, d.text] for i, d in collection.documents.items()]
    text = torch.frombuffer(bytearray(json.dumps(rows, ensure_ascii=False).encode()), dtype=torch.uint8)
    held: dict[str, Any] = {"format": FORMAT, "name": collection.name, "first": first, "documents": text}
    vectors = None
    if first == BM25:
        Bm25(texts)
    else:
        by = BiEncoder.load(first)
        vectors = torch.from_numpy(by.embed(texts, by.passage))
        held |= {"vectors": vectors, "encoder": by.digest(texts)}
    write_state(place, held | {"sha256": _digest(text, vectors)}, "search index")
    return place


def _digest(text: torch.Tensor, vectors: torch.Tensor | None) -> str:
    sha = hashlib.sha256(bytes_of(text))
    if vectors is not None:
        sha.update(bytes_of(vectors))
    return sha.hexdigest()
