"""The first stage: which documents of a collection a reranker is given for a query, by BM25 or by a bi-encoder.

run = first_stage(collection, "bm25", k=100)
run = first_stage(collection, BiEncoder.load("e5"), queries=collection.split("test"))
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.ranges import Range
from addenda.ranking.bi_encoder import BiEncoder
from addenda.ranking.bm25 import Bm25
from addenda.ranking.collection import Collection, Run


class Index(Protocol):
    """Documents in order, ready to be scored."""

    def scores(self, queries: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield for each query a score for every document."""
        ...


@checked(special={"k": Range(1, 10**6, whole=True)})
def first_stage(
    collection: Collection,
    by: Literal["bm25"] | BiEncoder = "bm25",
    *,
    queries: Iterable[str] | None = None,
    k: int = 100,
) -> Run:
    """Return the best k documents of each query, the best first; of equal scores the first in the collection.

    queries: ids, by default all of the collection's. BM25 leaves out documents that share no word with the query, so
    that a run may hold fewer, or none.
    Raises AddendaError for a collection that cannot be searched (`Collection.check`), and for an unknown query.
    """
    collection.check()
    asked: list[str] = list(collection.queries if queries is None else queries)
    if unknown := [q for q in asked if q not in collection.queries]:
        raise AddendaError(
            f"{collection.name} has no query {unknown[0]!r} ({len(unknown)} such)."
            f"{nearest(unknown[0], collection.queries)}"
        )
    ids, texts = list(collection.documents), [d.whole for d in collection.documents.values()]
    shared = by == "bm25"
    if not shared and not isinstance(by, BiEncoder):
        raise AddendaError(f"The first stage is 'bm25' or a BiEncoder, got {by!r}.")
    index: Index = Bm25(texts) if isinstance(by, str) else by.index(texts)
    found = index.scores([collection.queries[q] for q in asked])
    return {q: best(ids, scores, k, above=0.0 if shared else None) for q, scores in zip(asked, found, strict=True)}


def best(ids: Sequence[str], scores: np.ndarray, k: int, above: float | None = None) -> dict[str, float]:
    """Return the k ids of the highest scores, the best first, equal ones in their order. above: only such scores."""
    order = np.argsort(-scores, kind="stable")[:k]
    kept: list[int] = order.tolist() if above is None else [i for i in order.tolist() if scores[i] > above]
    return {ids[i]: float(scores[i]) for i in kept}
