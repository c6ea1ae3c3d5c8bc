"""Non-inferiority with seeds as units: the interval of a t test over seeds, and how often it errs, simulated."""

import numpy as np
import pytest
from scipy import stats

import addenda as ad
from addenda.transferring.verdict import better, deviation, non_inferior

RNG = np.random.default_rng(5)


def arm(seeds, items, accuracy, spread=0.0, rng=RNG):
    """Answers of an arm whose accuracy varies between seeds."""
    p = accuracy + spread * rng.standard_normal(seeds)
    return {s: (rng.random(items) < p[s]).astype(int).tolist() for s in range(seeds)}


def test_without_what_items_do_in_every_seed_it_is_the_t_test_of_the_seeds():
    a, b = arm(10, 1000, 0.7, 0.03), arm(10, 1000, 0.7, 0.03)
    found = non_inferior(a, b)
    gaps = np.array([np.mean(a[s]) - np.mean(b[s]) for s in range(10)])
    assert found.difference == pytest.approx(gaps.mean()) and [*found.gaps.values()] == pytest.approx(gaps.tolist())
    half = stats.t.ppf(0.95, 9) * gaps.std(ddof=1) / 10**0.5
    assert found.low == pytest.approx(gaps.mean() - half, rel=0.1, abs=0.002)
    assert found.high == pytest.approx(gaps.mean() + half, rel=0.1, abs=0.002)
    assert found.seeds == 10 and found.items == 1000 and found.enough


def test_the_verdict_is_by_the_bound_and_the_margin():
    same = arm(12, 1000, 0.7)
    worse = {s: [0] * 100 + items[100:] for s, items in same.items()}
    assert non_inferior(same, same).verdict == "non-inferior"
    assert non_inferior(worse, same).verdict == "inferior"
    assert non_inferior(worse, same, margin=0.2).verdict == "non-inferior"
    assert non_inferior(arm(10, 1000, 0.7, 0.12), arm(10, 1000, 0.7, 0.12)).verdict == "cannot tell"
    assert "non-inferior within 5 points" in str(non_inferior(same, same))


def test_with_fewer_seeds_or_items_it_cannot_be_told_and_the_numbers_are_there():
    few = non_inferior(arm(3, 1000, 0.7), arm(3, 1000, 0.7))
    assert few.verdict == "cannot tell" and few.low < few.difference < few.high
    assert "10 seeds and 900 items are wanted" in str(few)
    assert non_inferior(arm(10, 500, 0.7), arm(10, 500, 0.7)).verdict == "cannot tell"
    assert "(12 seeds and 1,200 items are wanted)" in str(
        non_inferior(arm(10, 1000, 0.7), arm(10, 1000, 0.7), seeds=12, items=1200)
    )
    one = non_inferior(arm(1, 1000, 0.7), arm(1, 1000, 0.7))
    assert one.verdict == "cannot tell" and (one.low, one.high) == (-1.0, 1.0)
    assert "1 seed × 1,000 items" in str(one)
    assert non_inferior(arm(3, 1000, 0.7), arm(3, 1000, 0.7), seeds=3, margin=0.2).verdict == "non-inferior"


def test_arms_that_cannot_be_paired_are_refused():
    a = arm(3, 10, 0.5)
    for wrong in ({9: a[0]}, {0: a[0][:5]}, {0: a[0], 1: a[1][:5]}, {0: []}):
        with pytest.raises(ad.AddendaError, match="item by item"):
            non_inferior(wrong, a)
    with pytest.raises(ad.AddendaError, match="margin="):
        non_inferior(a, a, margin=5)


def test_the_best_arm_and_the_spread_of_an_arm():
    arms = {"base": {0: [0, 0, 1], 1: [0, 0, 0]}, "source": {0: [1, 1, 0]}}
    assert better(arms) == "source"
    assert deviation({0: [1, 1], 1: [0, 0]}) == pytest.approx(2**-0.5) and deviation({0: [1]}) == 0.0


@pytest.mark.parametrize(("seeds", "items", "margin", "spread", "power"), [(10, 998, 0.05, 0.03, 0.95)])
def test_how_often_equal_arms_pass_and_worse_ones_do(seeds, items, margin, spread, power):
    """300 draws: equal arms pass in about 95 %, an arm that is worse by the margin in no more than 5 % or so."""
    rng, draws, passed = np.random.default_rng(2), 300, [0, 0]
    for _ in range(draws):
        b = arm(seeds, items, 0.7, spread, rng)
        for i, loss in enumerate((0.0, margin)):
            passed[i] += (
                non_inferior(arm(seeds, items, 0.7 - loss, spread, rng), b, margin=margin).verdict == "non-inferior"
            )
    assert abs(passed[0] / draws - power) < 0.04
    assert passed[1] / draws < 0.075
