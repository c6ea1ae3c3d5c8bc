"""How well images are ordered, by query and over all: correlations, errors, pairs, with an interval over images."""

from collections.abc import Mapping
from dataclasses import dataclass

from addenda.core.base.errors import AddendaError
from addenda.ranking.order.measures import bootstrap, measured, over_queries
from addenda.ranking.order.rank import ImageOrder
from addenda.ranking.order.ratings import Ratings


@dataclass(frozen=True)
class OrderEvaluation:
    """by_query: {query: {measure: value}}; mean: over queries; interval: 95 % of the mean Spearman, over images.

    counts: rated images of each query; compared: share of comparisons that are in the right order, by query.
    """

    by_query: Mapping[str, Mapping[str, float]]
    mean: Mapping[str, float]
    interval: tuple[float, float] | None
    counts: Mapping[str, int]
    compared: Mapping[str, float]


def evaluate_order(order: ImageOrder, ratings: Ratings, *, draws: int = 2000) -> OrderEvaluation:
    """Score every rated image and compare. Raises AddendaError for ratings without a query, and undecodable images."""
    if not ratings.queries:
        raise AddendaError(f"{ratings.source} rates no image, so there is nothing to compare with.")
    scores: dict[str, dict[str, float]] = {}
    values: dict[str, dict[str, float]] = {}
    compared: dict[str, float] = {}
    for query in ratings.queries:
        rated, pairs = ratings.values.get(query, {}), ratings.comparisons.get(query, ())
        asked = sorted({*rated, *(i for pair in pairs for i in pair)})
        found = order.scores([ratings.pictures[i] for i in asked], query)
        if order.skipped:
            name, why = next(iter(order.skipped.items()))
            raise AddendaError(f"{name} cannot be decoded: {why}. Mend it, or take it out of {ratings.source}.")
        by_position = {i: found[n] for n, i in enumerate(asked)}
        if rated:
            scores[query] = {ratings.pictures[i].key: by_position[i] for i in rated}
            values[query] = {ratings.pictures[i].key: v for i, v in rated.items()}
        if pairs:
            compared[query] = sum(by_position[a] > by_position[b] for a, b in pairs) / len(pairs)
    found = {q: measured([scores[q][k] for k in v], list(v.values())) for q, v in values.items()}
    interval = None
    if found:
        _, low, high = bootstrap(scores, values, draws=draws)
        interval = (low, high)
    return OrderEvaluation(found, over_queries(found), interval, {q: len(v) for q, v in values.items()}, compared)
