"""Error spending against published bounds and against simulated looks."""

import numpy as np
import pytest
from scipy import stats

from addenda.statistics import spending


def test_five_equal_looks_have_the_published_bounds(monkeypatch):
    monkeypatch.setattr(spending, "LOOKS", (1, 2, 3, 4, 5))
    monkeypatch.setattr(spending, "KEPT", 1.0)
    published = [2.4380, 2.4268, 2.4101, 2.3966, 2.3859]  # Lan and DeMets's Pocock-type, two-sided 0.05 (ld98)
    assert spending.bounds((1, 2, 3, 4, 5), 0.05) == pytest.approx(published, abs=1e-4)


def test_one_look_at_all_seeds_spends_everything():
    assert spending.bounds((20,), 0.05) == pytest.approx([stats.norm.isf(spending.KEPT * 0.025)])


@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_simulated_looks_cross_as_often_as_was_spent(alpha):
    rng, looks = np.random.default_rng(0), spending.LOOKS
    sums = rng.normal(size=(200_000, looks[-1])).cumsum(1)[:, [n - 1 for n in looks]]
    z = np.abs(sums) / np.sqrt(looks)
    crossed = [(z[:, : k + 1] > spending.bounds(looks[: k + 1], alpha)).any(1).mean() for k in range(len(looks))]
    assert crossed == pytest.approx([spending.spent(n / looks[-1], alpha) for n in looks], abs=0.002)
    assert crossed[-1] == pytest.approx(spending.KEPT * alpha, abs=0.002)


def test_looks_of_student_s_t_stay_below_the_level():
    rng, n = np.random.default_rng(1), 40_000
    d, ever = rng.normal(size=(n, spending.LOOKS[-1])), np.zeros(n, dtype=bool)
    for look in spending.LOOKS:
        ever |= stats.ttest_1samp(d[:, :look], 0, axis=1).pvalue < spending.level(look, 0.05)
    assert 0.04 < ever.mean() < 0.052


@pytest.mark.parametrize("seeds", [3, 4, 5, 12, 20, 31])
def test_overall_p_is_the_inverse_of_the_level(seeds):
    for alpha in (0.05, 0.1):
        assert spending.overall(seeds, spending.level(seeds, alpha)) == pytest.approx(alpha, rel=1e-6)
    for alpha in (0.2, 0.01, 0.05 / 15):
        assert spending.overall(seeds, spending.level(seeds, alpha)) == pytest.approx(alpha, rel=0.02)
    assert spending.overall(seeds, 0.0) == 0
    assert spending.overall(seeds, 1.0) == 1
    ps = [spending.overall(seeds, p) for p in np.geomspace(1e-12, 1, 60)]
    assert ps == sorted(ps)


def test_a_look_in_between_is_one_more():
    assert spending.schedule(3) == (3,)
    assert spending.schedule(6) == (3, 5, 6)
    assert spending.schedule(25) == (3, 5, 8, 12, 20, 25)
