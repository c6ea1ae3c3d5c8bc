"""Queries with their documents as groups to learn from: the answers first, then negatives, each pair a row of tokens.

made = query_groups(collection, hard_negatives(collection, [run]).by_query, tokenizer, RankingLoss("listwise"))
ad.fit(model, adapter, made, steps=1000, batch=4)         # four queries a step
"""

from collections.abc import Mapping, Sequence
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.ranking.collection import Collection, Run
from addenda.ranking.groups import Groups
from addenda.ranking.losses import RankingLoss
from addenda.ranking.pairs import passages


def query_groups(
    collection: Collection,
    negatives: Mapping[str, Sequence[str]],
    tokenizer: Any,
    loss: RankingLoss,
    *,
    split: str = "train",
    limit: int | None = None,
    teacher: Run | None = None,
    said: str = "",
) -> Groups:
    """Return a group for each query of `negatives`: all its answers in the split, labelled by grade, and its negatives.

    limit: tokens of a pair; only documents are cut. teacher: a run whose scores are learned from, of every document of
    every group; other losses leave it out. said: of the negatives, in words.
    Raises AddendaError for a query that nothing answers (but for "distill", which wants no answer), an answer among the
    negatives, a document that the teacher has not scored, and all that `pairs.passages` does, by id.
    """
    if loss.taught and teacher is None:
        raise AddendaError(
            f"The loss {loss.name!r} learns from another model's scores: give teacher=, a run that has scored every "
            "document of every group, such as one of a larger reranker."
        )
    if not loss.taught and teacher is not None:
        raise AddendaError(f"teacher= is for the losses 'distill' and 'margins'; {loss.name!r} has none. Leave it out.")
    judged = collection.split(split)
    rows: list[tuple[str, str]] = []
    labels: list[list[float]] = []
    for query, others in negatives.items():
        grades = judged.get(query, {})
        answers = [d for d, grade in grades.items() if grade > 0]
        if not answers and loss.name != "distill":
            raise AddendaError(
                f"Query {query!r} of {collection.name}'s {split!r} has no answer, and a group without one teaches "
                "nothing. Leave the query out."
            )
        if wrong := [d for d in others if d in answers]:
            raise AddendaError(f"Document {wrong[0]!r} answers query {query!r} and is among its negatives.")
        documents = [*answers, *others]
        if len(set(documents)) < len(documents):
            raise AddendaError(f"A negative of query {query!r} is there twice: {documents[len(answers) :]}.")
        rows += [(query, d) for d in documents]
        labels.append([float(max(grades.get(d, 0), 0)) for d in documents])
    _check_ids(collection, rows)
    pairs = [(collection.queries[q], collection.documents[d].whole) for q, d in rows]
    read = passages(tokenizer, pairs, limit, named=lambda i: (f"query {rows[i][0]!r}", f"document {rows[i][1]!r}"))
    scores = None if teacher is None else _scores(teacher, rows, labels)
    return Groups(read.tokens, labels, loss, scores, (said,) if said else ())


def _scores(teacher: Run, rows: Sequence[tuple[str, str]], labels: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the teacher's score of each row, by group."""
    missing = [(q, d) for q, d in rows if d not in teacher.get(q, {})]
    if missing:
        query, document = missing[0]
        raise AddendaError(
            f"The teacher has not scored document {document!r} for query {query!r} ({len(missing)} of {len(rows)} "
            "pairs lack a score). Let it score the answers and negatives of every query that is learned from, or take "
            "the negatives from its own run."
        )
    flat = iter([float(teacher[q][d]) for q, d in rows])
    return [[next(flat) for _ in group] for group in labels]


def _check_ids(collection: Collection, rows: Sequence[tuple[str, str]]) -> None:
    for query, document in rows:
        if query not in collection.queries or document not in collection.documents:
            raise AddendaError(
                f"Query {query!r} with document {document!r}: one of them is not in {collection.name}. Judgements and "
                "negatives must be of this collection."
            )
