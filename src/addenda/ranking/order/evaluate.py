"""How well images are ordered, by query and over all: correlations, errors, pairs, with an interval over images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Protocol

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Picture
from addenda.ranking.order.measures import bootstrap, measured, over_queries
from addenda.ranking.order.ratings import Ratings


class Scoring(Protocol):
    """What orders images: an `ImageOrder`, or ridges. skipped: why images of the last call have no score, by name."""

    skipped: dict[str, str]

    def scores(self, pictures: Sequence[Picture], sentence: str) -> dict[int, float]: ...


@dataclass(frozen=True)
class OrderEvaluation:
    """How well images are ordered, by people's ratings.

    by_query: {query: {measure: value}}; mean: over queries; interval: 95 % of the mean Spearman, over images.
    counts: rated images of each query; compared: share of comparisons that are in the right order, by query.
    difference: of the mean Spearman to that of another order, with its 95 % interval, on the same draws of images.
    """

    by_query: Mapping[str, Mapping[str, float]]
    mean: Mapping[str, float]
    interval: tuple[float, float] | None
    counts: Mapping[str, int]
    compared: Mapping[str, float]
    difference: tuple[float, float, float] | None = None

    def against(self, other: str = "the other adapter") -> str:
        """Return what may be said of this order and the other one: of these two, not of how they were made."""
        if self.difference is None or isnan(self.difference[0]):
            return "no correlation to compare: it wants a query with three rated images, and values that differ"
        found, low, high = self.difference
        word = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        return (
            f"{word} {other}: mean Spearman {found:+.3f} ({low:+.3f} to {high:+.3f}, 95 %, over images; of these two, "
            "not of two ways to train one)"
        )


def evaluate_order(
    order: Scoring, ratings: Ratings, *, against: Scoring | None = None, draws: int = 2000
) -> OrderEvaluation:
    """Score every rated image and compare. against: another order of the same images, see `OrderEvaluation`.

    Raises AddendaError for ratings without a query, and undecodable images.
    """
    if not ratings.queries:
        raise AddendaError(f"{ratings.source} rates no image, so there is nothing to compare with.")
    scores, values, compared = _scored(order, ratings)
    found = {q: measured([scores[q][k] for k in v], list(v.values())) for q, v in values.items()}
    interval = difference = None
    if found:
        interval = bootstrap(scores, values, draws=draws)[1:]
        if against is not None:
            difference = bootstrap(
                scores, values, minus=_scored(against, replace(ratings, comparisons={}))[0], draws=draws
            )
    counts = {q: len(v) for q, v in values.items()}
    return OrderEvaluation(found, over_queries(found), interval, counts, compared, difference)


def _scored(order: Scoring, ratings: Ratings) -> tuple[dict, dict, dict[str, float]]:
    """Return scores and values of each query's rated images, and the share of its comparisons in the right order."""
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
    return scores, values, compared
