"""The cheapest way to order images from the same ratings, to compare an adapter with: a ridge for each query.

    min_w,b  Σ_i (y_i − w·x_i − b)² + λ |w|²          x_i: the mean of an image's patches

in closed form, in float64; it hears no sentence, so it knows the trained queries alone. λ is the one of `PENALTIES`
(shares of the images' mean |x|², centred) with the least error on images left out one by one, which needs no fit of its
own: a residual without its image is (y_i − ŷ_i) / (1 − H_ii), ŷ = H y.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Picture
from addenda.ranking.order.features import Features
from addenda.ranking.order.ratings import Ratings

PENALTIES = tuple(10.0**k for k in range(-4, 4))


@dataclass(frozen=True)
class Ridge:
    """score = (x − centre) · weights + offset. centre, weights: D; penalty: λ. Of Q queries: D × Q, and Q numbers."""

    centre: np.ndarray
    weights: np.ndarray
    offset: float | np.ndarray
    penalty: float | np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return scores, N or N × Q, of images N × D."""
        return (x - self.centre) @ self.weights + self.offset


def fit_ridge(x: np.ndarray, y: np.ndarray, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """Return the ridge whose penalty has the least error on images left out one by one. x: N × D; y: N."""
    centre, offset = x.mean(0), float(y.mean())
    kernel = (x - centre) @ (x - centre).T
    lengths, vectors = np.linalg.eigh(kernel)
    lengths, turned = np.maximum(lengths, 0.0), vectors.T @ (y - offset)
    unit, found = max(float(np.trace(kernel)) / len(x), 1e-12), []
    for penalty in (unit * share for share in penalties):
        kept = lengths / (lengths + penalty)
        residuals = y - offset - vectors @ (kept * turned)
        without = residuals / np.maximum(1 - 1 / len(x) - vectors**2 @ kept, 1e-12)
        found.append((float((without**2).sum()), penalty))
    penalty = min(found)[1]
    weights = (x - centre).T @ (vectors @ (turned / (lengths + penalty)))
    return Ridge(centre, weights, offset, penalty)


class RidgeOrder:
    """Orders images by ridges on their patches. patches: of each image of `ratings`, P × D, as in training."""

    def __init__(self, features: Features, ratings: Ratings, patches: Sequence[Tensor]):
        x = np.stack([_mean(p) for p in patches])
        self.features, self.skipped = features, {}
        self.ridges = {
            query: fit_ridge(x[list(rated)], np.array(list(rated.values()), dtype=float))
            for query, rated in ratings.values.items()
        }
        self._known: dict[str, np.ndarray] = {}  # of images seen, by key: another sentence reads no patches again

    def scores(self, pictures: Sequence[Picture], sentence: str) -> dict[int, float]:
        """Return {position: score} of the images that can be decoded; the others are told in `skipped`.

        Raises AddendaError for a sentence that no ridge was fitted for.
        """
        if sentence not in self.ridges:
            raise AddendaError(f"There is no ridge for {sentence!r}, only for {', '.join(map(repr, self.ridges))}.")
        new, self.skipped = [p for p in pictures if p.key not in self._known], {}
        for i, patches in self.features.of(new):
            if isinstance(patches, str):
                self.skipped[new[i].name] = patches
            else:
                self._known[new[i].key] = _mean(patches)
        ridge = self.ridges[sentence]
        return {i: float(ridge(self._known[p.key])) for i, p in enumerate(pictures) if p.key in self._known}


def _mean(patches: Tensor) -> np.ndarray:
    """Return the mean of an image's patches, D."""
    return patches.double().mean(0).numpy()
