"""Ridges on patches: the least squares of a solver, a penalty that leaving images out chooses, an order like any."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Theirs
from tests.ranking.order.tiny_towers import apart, image

from addenda.core.base.errors import AddendaError
from addenda.ranking.order.evaluate import evaluate_order
from addenda.ranking.order.features import Features, all_of
from addenda.ranking.order.rank import images_in
from addenda.ranking.order.ratings import Ratings
from addenda.ranking.order.ridge import PENALTIES, RidgeOrder, fit_ridge
from addenda.ranking.order.towers import load_towers


def drawn(n=30, d=12, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.uniform(0.2, 3, d) + 5
    return x, x @ rng.normal(size=d) + noise * rng.normal(size=n) + 100


@pytest.mark.parametrize("shape", [(30, 12), (8, 40)])
def test_weights_are_those_of_another_solver(shape):
    x, y = drawn(*shape)
    for share in (1e-3, 1e-1, 10.0):
        found = fit_ridge(x, y, penalties=[share])
        theirs = Theirs(alpha=found.penalty, solver="svd").fit(x, y)
        np.testing.assert_allclose(found.weights, theirs.coef_, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(found(x), theirs.predict(x), rtol=1e-10)


def test_the_penalty_is_the_one_that_leaving_out_each_image_in_turn_chooses():
    chosen = set()
    for noise in (0.01, 3.0, 300.0):
        x, y = drawn(20, 15, noise)
        unit = ((x - x.mean(0)) ** 2).sum() / len(x)
        errors = []
        for share in PENALTIES:
            left_out = [(np.delete(x, i, 0), np.delete(y, i), x[i : i + 1]) for i in range(len(x))]
            out = [Theirs(alpha=share * unit, solver="svd").fit(a, b).predict(c) for a, b, c in left_out]
            errors.append(sum((float(p[0]) - v) ** 2 for p, v in zip(out, y, strict=True)))
        chosen.add(best := PENALTIES[int(np.argmin(errors))])
        assert fit_ridge(x, y).penalty == pytest.approx(best * unit)
    assert len(chosen) > 1


def test_values_all_alike_and_a_single_image_give_their_mean():
    x, _ = drawn(6)
    np.testing.assert_allclose(fit_ridge(x, np.full(6, 3.0))(x), 3.0)
    assert fit_ridge(x[:1], np.array([2.0]))(x).tolist() == [2.0] * 6


def test_ridges_order_images_by_what_was_rated(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    for shade in range(24):
        image(tmp_path / "photos" / f"{shade:02d}.png", shade * 10)
    pictures = images_in(tmp_path / "photos")
    vit, bert = apart(tmp_path)
    features = Features(load_towers(image=vit, text=bert))
    patches, _ = all_of(features, pictures)
    values = {"bright": {i: float(i) for i in range(0, 24, 2)}, "dark": {i: -float(i) for i in range(1, 24, 2)}}
    order = RidgeOrder(features, Ratings(tuple(pictures), values, {"other": ((0, 1),)}), patches)
    held = Ratings(
        tuple(pictures), {q: {i: v * (1 if q == "bright" else -1) for i, v in enumerate(range(24))} for q in values}
    )
    found = evaluate_order(order, held, against=order, draws=20)
    assert found.mean["spearman"] > 0.5 and found.difference == (0.0, 0.0, 0.0)
    read = Features.of
    monkeypatch.setattr(Features, "of", lambda self, some: read(self, some) if not some else pytest.fail("read again"))
    x = torch.stack(patches).double().mean(1).numpy()
    np.testing.assert_allclose(list(order.scores(pictures, "dark").values()), order.ridges["dark"](x))
    with pytest.raises(AddendaError, match="no ridge for 'red', only for 'bright', 'dark'"):
        order.scores(pictures, "red")
