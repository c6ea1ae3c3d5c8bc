"""How good an order of images is: correlations of ranks and values, errors, pairs; by query, with a bootstrap.

    spearman, kendall, pearson   of scores and values; kendall is τ-b, which knows ties
    mae                          mean of |score − value|, in the query's units
    grades                       share of images whose score rounds to their value, where values are whole numbers
    pairs                        share of pairs of images with different values that are in the right order

A query whose values are all alike, or with fewer than three images, has no correlation and is left out, with a word.
(The paper's code counts the diagonal and one more as right pairs, and averages correlations over categories.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream

DRAWS = 2000


def measured(scores: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Return every measure of one query; nan where it is not defined. Raises AddendaError for unlike lengths."""
    x, y = np.asarray(scores, dtype=float), np.asarray(values, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise AddendaError(f"Expected a score for each value, at least one, got {x.shape} and {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise AddendaError("Scores and values are finite numbers, and some here are not.")
    return {name: function(x, y) for name, function in _FUNCTIONS.items()}


def _mae(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.abs(x - y).mean())


def _grades(x: np.ndarray, y: np.ndarray) -> float:
    return float((np.floor(x + 0.5) == y).mean()) if (y == np.round(y)).all() else np.nan


def _pairs(x: np.ndarray, y: np.ndarray) -> float:
    upper = np.triu_indices(len(x), 1)
    found, asked = (np.sign(v[:, None] - v)[upper] for v in (x, y))
    return float((found == asked)[asked != 0].mean()) if (asked != 0).any() else np.nan


def _correlation(of: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a correlation that is nan where there is none to find, and 0 where scores have no order at all."""

    def found(x: np.ndarray, y: np.ndarray) -> float:
        if len(x) < 3 or not np.ptp(y):
            return np.nan
        return float(of(x, y)) if np.ptp(x) else 0.0

    return found


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


_FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "spearman": _correlation(lambda x, y: _pearson(stats.rankdata(x), stats.rankdata(y))),
    "kendall": _correlation(lambda x, y: stats.kendalltau(x, y).statistic),  # pyright: ignore
    "pearson": _correlation(_pearson),
    "mae": _mae,
    "grades": _grades,
    "pairs": _pairs,
}
MEASURES = tuple(_FUNCTIONS)


def over_queries(by_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each measure over the queries that have it; nan where none has."""
    found = {}
    for name in MEASURES:
        values = [m[name] for m in by_query.values() if not np.isnan(m[name])]
        found[name] = float(np.mean(values)) if values else float("nan")
    return found


def resamplings(images: int, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each of so many images is in each resampling of them; the same on every machine."""
    rng = Stream(seed, "bootstrap", str(images))
    for _ in range(draws):
        yield np.bincount((rng.raw(images) % np.uint64(images)).astype(np.int64), minlength=images)


def bootstrap(
    scores: Mapping[str, Mapping[str, float]],
    values: Mapping[str, Mapping[str, float]],
    measure: str = "spearman",
    *,
    minus: Mapping[str, Mapping[str, float]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (mean over queries, low, high): a 95 % interval over images, which are drawn for all queries alike.

    scores, values: {query: {image: number}}, the same images in both. minus: scores of another order of these images;
    what is returned is the difference then, both measured on the same draws.
    Raises AddendaError for an unknown measure.
    """
    if measure not in MEASURES:
        raise AddendaError(f"There is no measure {measure!r}. Give one of {', '.join(MEASURES)}.")
    images = sorted({i for known in values.values() for i in known})
    place = {image: n for n, image in enumerate(images)}
    of = _FUNCTIONS[measure]
    sides = (values, scores) if minus is None else (values, scores, minus)
    held = [
        (np.array([place[i] for i in known]), *(np.array([side[q][i] for i in known]) for side in sides))
        for q, known in values.items()
    ]

    def mean(times: np.ndarray) -> float:
        found = []
        for at, y, x, *other in held:
            drawn = np.repeat(np.arange(len(at)), times[at])
            if len(drawn):
                found.append(of(x[drawn], y[drawn]) - sum(of(z[drawn], y[drawn]) for z in other))
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")

    drawn = [mean(times) for times in resamplings(len(images), draws, seed)]
    known = [value for value in drawn if not np.isnan(value)] or [float("nan")]
    low, high = np.quantile(known, [0.025, 0.975])
    return mean(np.ones(len(images), dtype=int)), float(low), float(high)
