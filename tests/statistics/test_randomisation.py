"""The randomisation test against scipy's and against all signs written out."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from addenda.statistics.randomisation import FEW, randomised


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_few_differences_are_exact(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        x = np.round(rng.normal(0.4, 1, n), 1)  # with ties and zeros
        sums = [sum(s * v for s, v in zip(signs, x, strict=True)) for signs in product((-1, 1), repeat=n)]
        expected = np.mean([abs(total) >= abs(x.sum()) - 1e-9 for total in sums])
        assert randomised(x) == pytest.approx(expected, abs=1e-12)
        theirs = stats.permutation_test((x,), np.sum, permutation_type="samples", n_resamples=np.inf) if n > 1 else None
        if theirs is not None:
            assert randomised(x) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_many_differences_are_drawn_alike_for_one_seed_and_near_to_the_truth():
    x = np.random.default_rng(0).normal(0.15, 1, 200)
    p = randomised(x)
    assert p == randomised(x) == randomised(-x) == randomised(x * 1024.0)
    assert abs(p - randomised(x, seed=1)) < 0.01
    normal = 2 * stats.norm.sf(abs(x.sum()) / np.sqrt((x**2).sum()))
    assert p == pytest.approx(normal, abs=0.005)
    assert randomised(np.ones(400), draws=99) == 0.01  # never 0


def test_exact_and_drawn_agree_where_both_can_be_done():
    x = np.random.default_rng(3).normal(0.3, 1, FEW)
    exact = randomised(x)
    stretched = np.concatenate([x, np.full(5, 1e-13)])  # more than a few, and the five say nothing
    assert randomised(stretched) == pytest.approx(exact, abs=0.01)


def test_differences_that_are_all_0_tell_nothing():
    assert randomised(np.zeros(30)) == 1.0
    assert randomised(np.concatenate([np.zeros(300), [1.0]])) == 1.0


def test_p_is_uniform_where_two_systems_are_alike():
    rng = np.random.default_rng(5)
    found = np.array([randomised(rng.standard_t(3, 40), draws=199) for _ in range(1000)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(found <= level) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 1000))
