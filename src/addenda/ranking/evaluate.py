"""How good a reranker is on a collection: the first stage and what the reranker makes of it, by query.

    found = evaluate_reranker(reranker, collection, split="test", depth=50)
    found.rows(), found.words()

Only the best `depth` documents of the first stage are put in order: its recall there is the most that any order of them
can reach, and stands beside.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.ranking.bi_encoder import BiEncoder
from addenda.ranking.collection import Collection, Run
from addenda.ranking.first_stage import first_stage
from addenda.ranking.judge import MARGIN, Judgement, judge
from addenda.ranking.measures import by_query, means
from addenda.ranking.reranker import Reranker
from addenda.ranking.trec import strict

FIRST, RERANKED = "first stage", "reranked"
MEASURES = ("AP", "nDCG@10", "RR@10")


@dataclass(frozen=True)
class Evaluation:
    """How well a reranker orders the first stage's documents, beside that stage alone.

    runs, values: by system, values {measure: {query: value}}; judgement: of both systems, by AP.
    recall: of the first stage at `depth`; milliseconds: of a query, reranking its documents.
    """

    runs: Mapping[str, Run]
    values: Mapping[str, Mapping[str, Mapping[str, float]]]
    judgement: Judgement
    recall: float
    depth: int
    milliseconds: float

    def rows(self) -> list[list[str]]:
        """Return the rows of a table: each system, its AP with the 95 % interval, its other measures."""
        rows = []
        for system, values in self.values.items():
            row, other = self.judgement.row(system), means(values)
            rows.append([system, f"{row.mean:.3f} ({row.low:.3f} to {row.high:.3f})",
                         *(f"{other[m]:.3f}" for m in MEASURES[1:])])  # fmt: skip
        return rows

    def words(self) -> list[str]:
        """Return what may be said: the verdict on AP, the recall that bounds it, the time."""
        queries = len(next(iter(self.runs.values())))
        return [
            *self.judgement.words(),
            f"Recall of the first stage at {self.depth}: {self.recall:.3f}, which no order of these documents exceeds.",
            f"{self.milliseconds:.0f} ms a query for {self.depth} documents, {queries} queries.",
        ]


@checked()
def evaluate_reranker(
    reranker: Reranker,
    collection: Collection,
    *,
    first: BiEncoder | str = "bm25",
    split: str = "test",
    depth: int = 50,
    queries: int | None = None,
    margin: float = MARGIN,
    run: Run | None = None,
) -> Evaluation:
    """Measure a reranker over the first stage's best documents.

    first: "bm25" or a bi-encoder; run: another first stage's answers, in its place. queries: only so many, the first by
    id. margin: what counts as equal, of AP. Raises AddendaError for a split without judgements, and as `rerank` does.
    """
    if isinstance(first, str) and first != "bm25":
        first = BiEncoder.load(first)
    qrels = collection.split(split)
    asked = sorted(qrels)[:queries]
    qrels = {q: qrels[q] for q in asked}
    before = first_stage(collection, first, queries=asked, k=max(depth, 100)) if run is None else run
    lost = [q for q in asked if q not in before]
    if run is not None and len(lost) == len(asked):
        raise AddendaError(
            f"The run answers none of the {len(asked)} queries of {split!r}. Give the run of this split."
        )
    before = {q: before.get(q, {}) for q in asked}
    started = time.perf_counter()
    after = reranker.rerank(collection, before, depth=depth)
    seconds = time.perf_counter() - started
    runs = {FIRST: strict(before), RERANKED: strict(after)}
    values = {name: by_query(qrels, of, [*MEASURES, f"R@{depth}"]) for name, of in runs.items()}
    found = judge({name: {None: of["AP"]} for name, of in values.items()}, margin=margin, pairs=[(RERANKED, FIRST)])
    recall = means(values[FIRST])[f"R@{depth}"]
    return Evaluation(runs, values, found, recall, depth, 1000 * seconds / len(asked))
