"""Ridge regression in closed form, its penalty chosen on validation images: the baselines of `recipes.order`.

    one for each query      min |Y − X W − 1 b|² + λ |W|²          X: pixels, or pooled patches; λ by query
    image × text            min Σ_iq (y_iq − φ(x_i, t_q)·w)² + λ |w|²,   φ(x, t) = [x; 1] ⊗ [t; 1]

Both are solved by eigenvectors of the kernels, so that every λ costs a product. The second has N·Q equations in
(D + 1)(E + 1) unknowns; its kernel is K_T ⊗ K_X, with K_X = X Xᵀ + 1 and K_T = T Tᵀ + 1, and so

    A = U_X ((U_Xᵀ Y U_T) / (s_X s_Tᵀ + λ)) U_Tᵀ,   score(x, t) = (X x + 1)ᵀ A (T t + 1)

Everything is float64. A penalty is given as a share of the mean length of the (centred) rows, or of both kernels.
"""

from dataclasses import dataclass

import numpy as np

from addenda.ranking.order.ridge import PENALTIES, Ridge


def ridges(x: np.ndarray, y: np.ndarray, penalties: tuple[float, ...] = PENALTIES) -> list[Ridge]:
    """Return a ridge on all Q queries for every penalty. x: N × D; y: N × Q."""
    centre, offset = x.mean(0), y.mean(0)
    kernel = (x - centre) @ (x - centre).T
    values, vectors = np.linalg.eigh(kernel)
    turned, unit = vectors.T @ (y - offset), max(np.trace(kernel) / len(x), 1e-12)
    found = []
    for share in penalties:
        weights = (x - centre).T @ (vectors @ (turned / (np.maximum(values, 0.0) + share * unit)[:, None]))
        found.append(Ridge(centre, weights, offset, np.full(y.shape[1], share * unit)))
    return found


def ridge(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> Ridge:
    """Return the ridge of each query whose penalty has the least squared error on validation images."""
    all_of = ridges(x, y)
    best = np.argmin([((r(held_x) - held_y) ** 2).mean(0) for r in all_of], axis=0)
    weights = np.stack([all_of[b].weights[:, q] for q, b in enumerate(best)], 1)
    return Ridge(
        all_of[0].centre, weights, all_of[0].offset, np.array([all_of[b].penalty[q] for q, b in enumerate(best)])
    )


@dataclass(frozen=True)
class Product:
    """A ridge on image × text. centre, spread: of the images' channels; middle, length: of the texts."""

    x: np.ndarray
    t: np.ndarray
    coefficients: np.ndarray
    centre: np.ndarray
    spread: np.ndarray
    middle: np.ndarray
    length: float
    penalty: float

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return scores, N × Q, of images N × D by texts Q × E, in the units that it was fitted in."""
        images, texts = _scaled(x, self.centre, self.spread), (t - self.middle) / self.length
        return (images @ self.x.T + 1) @ self.coefficients @ (self.t @ texts.T + 1)


def products(x: np.ndarray, t: np.ndarray, y: np.ndarray, penalties: tuple[float, ...] = PENALTIES) -> list[Product]:
    """Return a ridge on image × text for every penalty. x: N × D; t: Q × E; y: N × Q."""
    centre, spread, middle = x.mean(0), np.maximum(x.std(0), 1e-6), t.mean(0)
    length = max(float(np.linalg.norm(t - middle, axis=1).mean()), 1e-12)
    images, texts = _scaled(x, centre, spread), (t - middle) / length
    (sx, ux), (st, ut) = (np.linalg.eigh(k) for k in (images @ images.T + 1, texts @ texts.T + 1))
    turned, unit = ux.T @ y @ ut, sx.mean() * st.mean()
    found = []
    for share in penalties:
        inner = turned / (np.outer(np.maximum(sx, 0.0), np.maximum(st, 0.0)) + share * unit)
        found.append(Product(images, texts, ux @ inner @ ut.T, centre, spread, middle, length, share * unit))
    return found


def product(x: np.ndarray, t: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> Product:
    """Return the ridge on image × text whose penalty has the least squared error on validation images."""
    all_of = products(x, t, y)
    errors = [((p(held_x, t) - held_y) ** 2).mean() for p in all_of]
    return all_of[int(np.argmin(errors))]


def _scaled(x: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return (x - centre) / spread / x.shape[1] ** 0.5
