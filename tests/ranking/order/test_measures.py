"""Measures of an order against loops and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from addenda import AddendaError
from addenda.ranking.order.measures import bootstrap, measured, over_queries, resamplings


def test_measures_are_what_loops_and_scipy_give():
    rng = np.random.default_rng(0)
    for _ in range(50):
        y = rng.integers(0, 4, 12).astype(float)
        x = y + rng.normal(size=12).round(1)
        found = measured(x, y)
        asked = [(i, j) for i, j in itertools.combinations(range(12), 2) if y[i] != y[j]]
        right = sum((x[i] - x[j]) * (y[i] - y[j]) > 0 for i, j in asked)
        assert found["pairs"] == pytest.approx(right / len(asked))
        assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(x, y, strict=True)) / 12)
        assert found["grades"] == pytest.approx(sum(math.floor(a + 0.5) == b for a, b in zip(x, y, strict=True)) / 12)
        rx, ry = stats.rankdata(x), stats.rankdata(y)
        assert found["spearman"] == pytest.approx(np.corrcoef(rx, ry)[0, 1])
        concordant = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(12), 2))
        ties = [sum(v[i] != v[j] for i, j in itertools.combinations(range(12), 2)) for v in (x, y)]
        assert found["kendall"] == pytest.approx(concordant / math.sqrt(ties[0] * ties[1]))
        assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_what_is_not_defined_is_nan_and_left_out_of_means():
    alike = measured([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert math.isnan(alike["spearman"]) and math.isnan(alike["pairs"]) and alike["mae"] == pytest.approx(2 / 3)
    assert math.isnan(measured([0.5], [0.25])["grades"])
    flat = measured([1.0] * 4, [1.0, 2.0, 3.0, 4.0])
    assert flat["spearman"] == flat["kendall"] == 0 and flat["pairs"] == 0
    both = over_queries({"a": alike, "b": flat})
    assert both["spearman"] == 0 and both["mae"] == pytest.approx((2 / 3 + 1.5) / 2)
    for scores, values in (([1.0], [1.0, 2.0]), ([], []), ([math.nan, 1], [1, 2])):
        with pytest.raises(AddendaError):
            measured(scores, values)


def test_the_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    truth = 0.6
    spearman = 6 / math.pi * math.asin(truth / 2)  # of two normals with this correlation
    inside = 0
    for trial in range(40):
        y = rng.normal(size=80)
        x = truth * y + math.sqrt(1 - truth**2) * rng.normal(size=80)
        names = [str(i) for i in range(80)]
        scores, values = ({"q": dict(zip(names, v.tolist(), strict=True))} for v in (x, y))
        mean, low, high = bootstrap(scores, values, draws=120, seed=trial)
        assert low < mean < high
        inside += low < spearman < high
        other = {"q": {name: -value for name, value in scores["q"].items()}}
        assert bootstrap(scores, values, minus=other, draws=20, seed=trial)[0] == pytest.approx(2 * mean)
    assert inside >= 32  # of 40; 95 % is 38
    with pytest.raises(AddendaError, match="no measure"):
        bootstrap(scores, values, "accuracy")


def test_resamplings_draw_as_many_images_as_there_are_the_same_each_time():
    drawn = np.stack(list(resamplings(40, 500)))
    assert drawn.shape == (500, 40) and (drawn.sum(1) == 40).all()
    assert (drawn[:9] == np.stack(list(resamplings(40, 9)))).all() and (drawn[0] != drawn[1]).any()
    assert drawn.mean(0) == pytest.approx(1, abs=0.25) and drawn.var() == pytest.approx(39 / 40, abs=0.05)
