"""Hard negatives: documents that a first stage takes for answers and that are none, drawn for each query.

Candidates are the best documents of one or more runs, without those that answer the query in any split, without what
is nearly the same as an answer (`Collection.near`, either way, and equal texts), so that no negative is an answer that
nobody has judged. What a run lacks is drawn from all other documents, and said. The draws are keyed by seed and query:
they do not change where queries are added or left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.ranking.collection import Collection, Run


@dataclass(frozen=True)
class Negatives:
    """Documents that answer a query not. by_query: n ids each. filled: of those, how many no run had, where any."""

    by_query: Mapping[str, tuple[str, ...]]
    filled: Mapping[str, int]
    said: str


@checked()
def hard_negatives(
    collection: Collection,
    runs: Sequence[Run],
    *,
    negatives: int = 7,
    split: str = "train",
    depth: int = 100,
    seed: int = 0,
) -> Negatives:
    """Return so many negatives for each judged query of a split, in the order of the collection.

    runs: of first stages; of each the best `depth` documents of a query are candidates. No run: all are drawn from the
    whole collection. A document that was judged and is no answer may be drawn, as any other.
    Raises AddendaError where a query has fewer documents that may be its negatives than were asked for, and for a run
    of another collection.
    """
    judged = collection.split(split)
    for run in runs:
        if foreign := [d for q in judged for d in run.get(q, ()) if d not in collection.documents]:
            raise AddendaError(
                f"A run names document {foreign[0]!r}, which {collection.name} has not: it is of another collection. "
                "Give the run of this one."
            )
    position = {d: i for i, d in enumerate(collection.documents)}
    ids, twins, near = list(position), _alike(collection), _both_ways(collection)
    by_query, filled = {}, {}
    for query in judged:
        barred = _barred(collection, query, twins, near)
        of_run = {d for run in runs for d in _first(run.get(query, {}), depth)} - barred
        hard = sorted(of_run, key=position.__getitem__)
        rng = Stream(seed, "negatives", query)
        drawn = [hard[i] for i in rng.choice(len(hard), min(negatives, len(hard))).tolist()]
        if short := negatives - len(drawn):
            others = [d for d in ids if d not in barred and d not in of_run]
            if len(others) < short:
                raise AddendaError(
                    f"Query {query!r} has {len(others) + len(drawn)} documents that may be its negatives (of "
                    f"{len(ids)}; answers and what is nearly the same are none), and {negatives} were asked for. Ask "
                    "for fewer, or give more documents."
                )
            drawn += [others[i] for i in rng.choice(len(others), short).tolist()]
            filled[query] = short
        by_query[query] = tuple(sorted(drawn, key=position.__getitem__))
    return Negatives(by_query, filled, _said(by_query, filled, negatives, bool(runs)))


def _barred(collection: Collection, query: str, twins: Mapping, near: Mapping) -> set[str]:
    """Return the answers of a query in every split, and what is nearly the same as one of them."""
    found = {d for qrels in collection.qrels.values() for d, grade in qrels.get(query, {}).items() if grade > 0}
    close = {other for d in found for other in near.get(d, ())}
    return found | close | {other for d in found for other in twins.get(d, ())}


def _both_ways(collection: Collection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for d, others in collection.near.items():
        for other in others:
            found.setdefault(d, set()).add(other)
            found.setdefault(other, set()).add(d)
    return found


def _alike(collection: Collection) -> dict[str, list[str]]:
    """Return the documents of equal texts, but for case and spaces, by each of them."""
    by_text: dict[str, list[str]] = {}
    for d, document in collection.documents.items():
        by_text.setdefault(" ".join(document.whole.casefold().split()), []).append(d)
    return {d: same for same in by_text.values() if len(same) > 1 for d in same}


def _first(scores: Mapping[str, float], depth: int) -> list[str]:
    """Return the best documents of a run's answer, equal scores in its order."""
    ids = list(scores)
    order = np.argsort(-np.array([scores[d] for d in ids], dtype=np.float64), kind="stable")[:depth]
    return [ids[i] for i in order]


def _said(by_query: Mapping, filled: Mapping[str, int], n: int, ran: bool) -> str:
    told = f"{n} negatives for each of {len(by_query):,} queries"
    if not ran:
        return f"{told}, drawn from all documents"
    if not filled:
        return f"{told}, all of them out of the first stage"
    return (
        f"{told}; for {len(filled):,} of these the first stage had too few ({next(iter(filled))!r} lacked "
        f"{next(iter(filled.values()))}), and {sum(filled.values()):,} were drawn from all documents"
    )
