"""Variances and degrees of freedom against dense derivations, scipy's own tests, and a known truth."""

import numpy as np
import pytest
from scipy import stats

from addenda.statistics.intervals import Pool, Pooled, of_answers, quantile, residual, spread, two_sided, uneven, within


def means(y):
    return {f"arm {i}": dict(enumerate(map(float, row))) for i, row in enumerate(y)}


def test_residual_is_that_of_a_two_way_table():
    y = np.random.default_rng(0).normal(size=(4, 3))
    left = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    found = residual(means(y))
    assert found.freedom == 6
    assert found.variance == pytest.approx((left**2).sum() / 6)


def test_residual_of_two_arms_is_half_the_variance_of_their_difference():
    y = np.random.default_rng(1).normal(size=(2, 5))
    assert 2 * residual(means(y)).variance == pytest.approx((y[0] - y[1]).var(ddof=1))


def test_residual_with_missing_cells_is_by_least_squares():
    y = np.random.default_rng(2).normal(size=(3, 4))
    table = means(y)
    del table["arm 1"][3], table["arm 2"][0]
    cells = [(i, s) for i in range(3) for s in range(4) if (i, s) not in ((1, 3), (2, 0))]
    design = np.array([[i == 0, i == 1, i == 2, s == 1, s == 2, s == 3] for i, s in cells], dtype=float)
    observed = np.array([y[c] for c in cells])
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    found = residual(table)
    assert found.freedom == 4 == round(np.trace(np.eye(10) - hat))
    assert found.variance == pytest.approx(observed @ (np.eye(10) - hat) @ observed / 4)


def test_within_counts_shared_seeds_once():
    rng, y = np.random.default_rng(3), np.zeros((4, 6))
    alike = y + rng.normal(size=6)
    apart = rng.normal(size=(40, 6))
    assert within(means(alike)) == Pooled(pytest.approx(alike[0].var(ddof=1)), pytest.approx(5))
    assert within(means(apart)).variance == pytest.approx(apart.var(axis=1, ddof=1).mean())
    assert 60 < within(means(apart)).freedom <= 200
    assert within(means(apart[:, :1])).freedom == 0


def test_an_arm_of_its_own_scatters_more_than_the_others_and_beyond_chance():
    rng = np.random.default_rng(8)
    runs = rng.normal(size=(4000, 4, 20))
    assert uneven(runs).mean() < 0.002  # F(19, 38) at 0.1 % is 3.1: four times is more
    few = rng.normal(size=(20000, 4, 3))
    assert 0.0003 < uneven(few).mean() < 0.002  # F(2, 4) at 0.1 % is 61
    runs[:, 2] *= 4
    assert uneven(runs)[:, 2].mean() > 0.95
    assert uneven(runs)[:, [0, 1, 3]].mean() < 0.002
    assert not uneven(runs[:, :2]).any() and not uneven(runs[:, :, :1]).any()
    a, others = runs[0, 2], runs[0, [0, 1, 3]]
    left = others - others.mean(0) - others.mean(1, keepdims=True) + others.mean()
    assert (a - others.mean(0)).var(ddof=1) / (4 / 3) > 4 * (left**2).sum() / 38


def test_a_pool_leaves_out_an_arm_that_scatters_more():
    y = np.random.default_rng(9).normal(size=(4, 8))
    y[3] *= 30
    pool = Pool.of(means(y))
    assert pool.arms == {"arm 0", "arm 1", "arm 2"}
    assert pool.two.variance == pytest.approx(2 * residual(means(y[:3])).variance)
    d = y[3] - y[0]
    assert pool.of_pair("arm 0", "arm 1", d) == pool.two and pool.of_arm("arm 0", y[0]) == pool.one
    assert pool.of_pair("arm 3", "arm 0", d) == Pooled(pytest.approx(d.var(ddof=1)), 7)
    assert pool.of_arm("diverged", y[3]) == Pooled(pytest.approx(y[3].var(ddof=1)), 7)
    assert pool.of_arm("diverged", y[3][:1]) == Pooled() == Pool.of({}).one


@pytest.mark.parametrize("freedom", [2, 3, 6, 21])
def test_intervals_of_a_sum_cover_by_integration(freedom):
    """A known part and one that is estimated with few degrees of freedom, in any mixture."""
    chi = stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom
    covered = []
    for known in (0.0, 0.03, 0.15, 0.5, 1.0, 3.0, 10.0, 50.0):
        error, df = spread(known, chi, 0.0, 10**9, freedom)
        half = stats.t.ppf(0.975, df) * error
        covered.append(np.mean(2 * stats.norm.cdf(half / np.sqrt(known + 1)) - 1))
    assert min(covered) > 0.941
    assert max(covered) < 0.969
    assert covered[0] == pytest.approx(0.95, abs=1e-3)


def test_one_seed_is_the_paired_t():
    rng = np.random.default_rng(4)
    a, b = (rng.random((2, 300)) < 0.6).astype(float)
    error, df = spread(*of_answers((a - b)[None], Pooled()), 300, 0)
    theirs = stats.ttest_rel(a, b)
    assert two_sided((a - b).mean(), float(error), float(df)) == pytest.approx(theirs.pvalue)
    half = quantile(0.975, float(df)) * error
    interval = theirs.confidence_interval()
    assert ((a - b).mean() - half, (a - b).mean() + half) == pytest.approx((interval.low, interval.high))


def test_seeds_that_swamp_the_items_give_the_t_interval_of_the_seed_means():
    x = np.repeat([[1.0], [0.0], [1.0], [1.0]], 50, axis=1)
    error, df = spread(*of_answers(x, Pooled(x.mean(1).var(ddof=1), 3)), 50, 3)
    expected = stats.ttest_1samp([1, 0, 1, 1], 0).confidence_interval()
    assert stats.t.interval(0.95, df, 0.75, error) == pytest.approx((expected.low, expected.high))


def test_variance_is_that_of_a_crossed_random_model():
    rng = np.random.default_rng(5)
    seeds, items, found = 4, 60, []
    for _ in range(400):
        x = rng.normal(0, 0.5, items) + rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, 1, (seeds, items))
        found.append(spread(*of_answers(x, Pooled(x.mean(1).var(ddof=1), 3)), items, 3)[0] ** 2)
    truth = 0.25 / items + 0.09 / seeds + 1 / (seeds * items)
    assert np.mean(found) == pytest.approx(truth, rel=0.12)


def test_where_nothing_varies_nothing_is_unsure():
    assert spread(0.0, 0.0, 0.0, 10, 0) == (0.0, np.inf)
    assert two_sided(0.0, 0.0, np.inf) == 1
    assert two_sided(0.1, 0.0, np.inf) == 0
