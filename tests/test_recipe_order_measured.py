"""Ridges against normal equations written out, the bootstrap against scipy on repeated images, contrasts by hand."""

import numpy as np
import pytest
import torch
from recipes.order_alignment import aligned
from recipes.order_measured import OTHER, contrast, kept, pool_of, resampled, seeds_of
from recipes.order_ridge import PENALTIES, product, products, ridge, ridges
from scipy import stats

from addenda.core.base.errors import AddendaError
from addenda.ranking.order.measures import resamplings

DRAW = np.random.default_rng(0)


def times(images, draws):
    return np.stack(list(resamplings(images, draws)))


def test_a_ridge_is_the_normal_equations_solution():
    x, y, held = DRAW.normal(size=(12, 30)), DRAW.normal(size=(12, 3)), DRAW.normal(size=(5, 30))
    found = ridges(x, y)
    assert len(found) == len(PENALTIES)
    for one in found[::2]:
        for q in range(3):
            # [x, 1] with a constant that is not punished
            wide = np.hstack([x, np.ones((12, 1))])
            punished = one.penalty[q] * np.diag([1.0] * 30 + [0.0])
            w = np.linalg.solve(wide.T @ wide + punished, wide.T @ y[:, q])
            assert np.allclose(one(held)[:, q], held @ w[:30] + w[30], rtol=1e-7, atol=1e-9)


def test_a_ridge_on_image_times_text_is_the_normal_equations_solution():
    x, t, y = DRAW.normal(size=(8, 6)), DRAW.normal(size=(4, 5)), DRAW.normal(size=(8, 4))
    new_x, new_t = DRAW.normal(size=(3, 6)), DRAW.normal(size=(2, 5))
    for one in products(x, t, y)[::3]:

        def row(image, text, one=one):
            a = np.append((image - x.mean(0)) / x.std(0) / 6**0.5, 1.0)
            length = np.linalg.norm(t - t.mean(0), axis=1).mean()
            return np.kron(a, np.append((text - t.mean(0)) / length, 1.0))

        rows = np.stack([row(image, text) for image in x for text in t])
        w = np.linalg.solve(rows.T @ rows + one.penalty * np.eye(rows.shape[1]), rows.T @ y.reshape(-1))
        want = np.array([[row(image, text) @ w for text in new_t] for image in new_x])
        assert np.allclose(one(new_x, new_t), want, rtol=1e-6, atol=1e-8)


def test_penalties_are_those_with_the_least_error_on_validation_images():
    x, held = DRAW.normal(size=(20, 40)), DRAW.normal(size=(60, 40))
    w = np.zeros((40, 2))
    w[0] = 3.0, 0.0  # the first query can be learned, the second is noise
    y, held_y = x @ w + 0.1 * DRAW.normal(size=(20, 2)), held @ w + [[0.0, 5.0]] * 60
    best = ridge(x, y, held, held_y)
    errors = np.array([((r(held) - held_y) ** 2).mean(0) for r in ridges(x, y)])
    assert np.allclose(((best(held) - held_y) ** 2).mean(0), errors.min(0)) and best.penalty[0] < best.penalty[1]
    t = DRAW.normal(size=(2, 5))
    errors = [((p(held, t) - held_y) ** 2).mean() for p in products(x, t, y)]
    assert ((product(x, t, y, held, held_y)(held, t) - held_y) ** 2).mean() == min(errors)


def test_resamplings_are_spearmans_correlation_of_repeated_images():
    scores, values = DRAW.normal(size=40).round(1), (np.arange(40) % 4).astype(float)
    drawn = times(40, 30)
    for found, row in zip(resampled(scores, values, drawn), drawn, strict=True):
        at = np.repeat(np.arange(40), row)
        assert found == pytest.approx(stats.spearmanr(scores[at], values[at]).statistic, abs=1e-12)
    assert (resampled(np.zeros(40), values, drawn) == 0).all()
    assert np.isnan(resampled(scores, np.ones(40), drawn)).all()


def test_what_is_kept_is_the_mean_over_queries_and_no_score():
    values = {"a": np.arange(30) % 3.0, "b": np.arange(30) // 10.0, "c": np.arange(30.0)}
    scores = {"a": values["a"] + 0.1 * DRAW.normal(size=30), "b": DRAW.normal(size=30)}
    found = kept(scores, values, {"x": ["a", "b"], "y": ["c"]}, 20, other="x")
    rho = {q: stats.spearmanr(scores[q], values[q]).statistic for q in "ab"}
    tau = stats.kendalltau(scores["a"], values["a"]).statistic
    assert found["by_query"]["x"]["a"][:2] == [pytest.approx(rho["a"], abs=1e-5), pytest.approx(tau, abs=1e-5)]
    assert found["mean"]["x"] == pytest.approx((rho["a"] + rho["b"]) / 2, abs=1e-5) and set(found["mean"]) == {
        "x",
        OTHER,
    }
    across = [stats.spearmanr(scores[p], values[q]).statistic for p, q in ("ab", "ba")]
    assert found["mean"][OTHER] == pytest.approx(np.mean(across), abs=1e-5)
    want = np.mean([resampled(scores[q], values[q], times(30, 20)) for q in "ab"], 0)
    assert np.allclose(found["draws"]["x"], want, atol=6e-5) and len(found["draws"]["x"]) == 20


def test_a_contrast_adds_images_and_seeds_and_takes_their_interaction_once():
    """Values of a linear statistic, a mean over images, whose variance is known."""
    images, seeds, draws = 200, 5, 3000
    drawn, item, seed = times(images, draws), DRAW.normal(size=images), 0.05 * DRAW.normal(size=(3, seeds))
    of = {}
    for n, arm in enumerate("abc"):
        x = (n == 0) * 0.5 * item + seed[n][:, None] + 0.3 * DRAW.normal(size=(seeds, images))
        of[arm] = {s: (float(x[s].mean()), drawn @ x[s] / images) for s in range(seeds)}
        if n == 0:
            a = x
        elif n == 1:
            b = x
    found = contrast(of["a"], of["b"], pool_of(of), ("a", "b"), images)
    d = a - b
    assert found.difference == pytest.approx(d.mean()) and (found.seeds, found.items) == (5, 200)
    rest = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    shared = (rest**2).sum() / (images - 1) / (seeds - 1) / images / seeds
    over = pool_of(of).two.variance / seeds
    assert found.error**2 == pytest.approx(d.mean(0).var() / images - shared + over, rel=0.1)
    assert found.interval()[0] < found.difference < found.interval()[1] and found.df > 4
    alone = contrast(of["c"], None, pool_of(of), ("c", "c"), images)
    assert alone.difference == pytest.approx(np.mean([v for v, _ in of["c"].values()]))
    assert contrast({0: of["a"][0]}, of["b"], pool_of(of), ("a", "b"), images) is None


def test_another_text_is_read_from_the_dual_head_alone():
    made = {"mosaics-dual-20-0": {"mean": {"classes": 0.5, OTHER: -0.1}, "draws": {"classes": [0.4], OTHER: [0.0]}}}
    assert seeds_of(made.get, "mosaics", "dual", 20, "classes", (0, 1))[0][0] == 0.5
    assert seeds_of(made.get, "mosaics", OTHER, 20, "classes", (0, 1))[0][0] == -0.1
    assert seeds_of(made.get, "mosaics", "blind", 20, "classes", (0, 1)) == {}


def test_the_alignment_counts_places_that_take_a_sentence():
    centres = torch.eye(4)[:, :3] * 3.0  # three kinds of tile, and blanks at the origin
    kinds = torch.arange(60) % 3
    patches = [torch.stack([centres[k], centres[3], centres[3]]) + 0.05 * torch.randn(3, 3) for k in kinds.tolist()]
    classes = np.stack([kinds.numpy(), np.full(60, -1), np.full(60, -1)], 1)
    names = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    made = aligned(patches, classes, names, seed=0)
    many = torch.stack([torch.stack([centres[0]] * n + [centres[1]] * (3 - n)) for n in range(4)])
    scores = made.scores(many, names[0])
    assert (np.diff(scores) > 0.2).all() and (np.diff(made.scores(many, names[1])) < -0.2).all()
    assert (aligned(patches, classes, names, seed=0).scores(many, names[0]) == scores).all()


def test_a_score_without_an_order_counts_as_nothing_and_one_that_is_no_number_stops():
    values, groups = {"a": np.arange(12.0)}, {"x": ["a"]}
    found = kept({"a": np.ones(12)}, values, groups, 5)
    assert found["mean"]["x"] == 0 and found["draws"]["x"] == [0.0] * 5
    with pytest.raises(AddendaError, match="finite"):
        kept({"a": np.where(np.arange(12) == 3, np.nan, 1.0)}, values, groups, 5)
