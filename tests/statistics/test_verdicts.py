"""Verdicts: each from answers that must have it, their words, Holm's correction, and what would decide."""

from dataclasses import replace

import numpy as np
import pytest

from addenda.statistics import spending
from addenda.statistics.intervals import Pooled, quantile
from addenda.statistics.verdicts import PairedDifference, judged, measured, unknown


def pair_of(x, pooled, margin=0.02, until=False):
    (pair,) = judged([measured("a", "b", x, pooled, margin, until)], until)
    return pair


def differences(mean, seeds=5, items=1000, spread=0.0, rng=None):
    """Differences −1, 0, 1 of a mean, with a part that depends on the seed."""
    rng = rng or np.random.default_rng(0)
    shift = mean + spread * np.linspace(-1, 1, seeds)[:, None]
    u = rng.random((seeds, items))
    return (u < 0.1 + np.maximum(shift, 0)).astype(float) - (u > 0.9 + np.minimum(shift, 0))


def test_holm_textbook_example():
    ps = (0.01, 0.04, 0.03, 0.005)
    blank = unknown("a", "b", 0.02, "")
    found = [replace(blank, pair=replace(blank.pair, p=p)) for p in ps]
    assert [p.p_holm for p in judged(found, False)] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_void_pair_is_no_test():
    blank = unknown("a", "b", 0.02, "")
    found = [replace(blank, pair=replace(blank.pair, p=0.03)), unknown("a", "c", 0.02, "c diverged", "void")]
    one, other = judged(found, False)
    assert one.p_holm == 0.03
    assert other.verdict == "void" and other.turned().verdict == "void"
    assert other.words({"c": "C"}) == "a and C cannot be compared: c diverged"


def test_each_verdict_and_its_words():
    better = pair_of(differences(0.3), Pooled(1e-4, 8))
    assert better.verdict == "better" and better.better == "a" and better.turned().verdict == "worse"
    assert better.words().startswith("a better than b by ") and better.turned().words() == better.words()
    equal = pair_of(np.tile(differences(0.0, 1, 20000), (5, 1)), Pooled(1e-6, 8))
    assert equal.verdict == equal.turned().verdict == "equivalent"
    assert "equivalent within ±2 points" in equal.words()
    unsure = pair_of(differences(0.0), Pooled(4e-3, 8))
    assert unsure.verdict == "undecided" and unsure.better is None
    assert "undecided" in unsure.words() and "would decide" in unsure.words()


def test_no_gain_is_said_of_the_arm_that_is_behind():
    ahead = pair_of(differences(0.03, items=4000), Pooled(1.5e-3, 8))
    assert ahead.verdict == "undecided"
    assert ahead.low90 > -0.02 and ahead.high90 > 0.02
    behind = ahead.turned()
    assert behind.verdict == "no gain"
    assert behind.words().startswith("b gains no more than 2 points over a")
    assert behind.turned() == ahead


def test_a_margin_is_the_90_percent_interval():
    pair = pair_of(differences(0.0, items=4000), Pooled(2e-4, 8))
    half = quantile(0.95, pair.df) * pair.error
    assert (pair.low90, pair.high90) == pytest.approx((pair.difference - half, pair.difference + half))
    inside, outside = abs(pair.difference) + half * 1.001, abs(pair.difference) + half * 0.999
    x = differences(0.0, items=4000)
    assert pair_of(x, Pooled(2e-4, 8), margin=inside).verdict == "equivalent"
    assert pair_of(x, Pooled(2e-4, 8), margin=outside).verdict != "equivalent"


def test_looks_ask_for_more_of_a_difference():
    x, pooled = differences(0.05, seeds=5), Pooled(5e-4, 8)
    once, often = pair_of(x, pooled), pair_of(x, pooled, until=True)
    assert often.p == pytest.approx(spending.overall(5, once.p))
    assert often.low < once.low and often.high > once.high and often.low90 < once.low90
    assert (often.low > 0) == (often.p < 0.05)


@pytest.mark.parametrize("until", [False, True])
def test_the_seeds_that_would_decide_do(until):
    variance = 4e-4 if until else 1e-3
    rng = np.random.default_rng(1)
    x = differences(0.015, seeds=5, items=8000, rng=rng)
    pair = pair_of(x, Pooled(variance, 8), until=until)
    assert pair.verdict == "undecided" and pair.more_seeds and pair.more_seeds > 1
    assert f"{pair.more_seeds} more seeds would decide" in (pair.why or "")
    if until:
        assert 5 + pair.more_seeds in spending.LOOKS or 5 + pair.more_seeds > spending.LOOKS[-1]

    def then(seeds):
        more = differences(0.015, seeds=seeds, items=8000, rng=rng)
        found = measured("a", "b", more - more.mean() + x.mean(), Pooled(variance, 2 * (seeds - 1)), 0.02, until)
        return judged([found], until)[0].verdict

    assert then(5 + pair.more_seeds) in ("better", "equivalent")
    assert then(5 + pair.more_seeds // 2) == "undecided"


def test_items_that_alone_leave_too_much_cannot_be_made_up_for_by_seeds():
    x = np.tile(differences(0.012, 1, 300, rng=np.random.default_rng(2)), (5, 1))
    pair = pair_of(x, Pooled(1e-5, 8))
    pair = pair if pair.difference > 0 else pair.turned()
    assert pair.verdict == "undecided" and pair.more_seeds is None
    assert "300 items alone" in (pair.why or "") and "not seeds" in pair.words()


def test_items_too_few_to_rule_out_a_kind_that_never_came_are_no_difference_on_the_margin():
    pair = pair_of(np.zeros((4, 100)), Pooled(0.0, 3))
    assert pair.verdict == "undecided" and pair.high90 == pytest.approx(1 - 0.05 ** (1 / 100))
    assert pair.why == "the 100 items alone leave ±3.0 points, so more of them are needed, not seeds"


def test_one_seed_or_one_item_is_undecided_and_says_so():
    one = pair_of(np.ones((1, 500)), Pooled())
    assert (one.verdict, one.low, one.high, one.more_seeds) == ("undecided", -1, 1, 2)
    assert "one seed" in one.words()
    one = pair_of(np.ones((4, 1)), Pooled(0.01, 6))
    assert (one.verdict, one.low90, one.high90, one.more_seeds) == ("undecided", -1, 1, None)
    assert "one item" in one.words()


def test_answers_that_are_all_alike():
    same = pair_of(np.zeros((4, 1000)), Pooled(0.0, 3))
    assert same.verdict == "equivalent" and same.low < 0 < same.high and same.p == 1
    apart = pair_of(np.ones((4, 1000)), Pooled(0.0, 3))
    assert apart.verdict == "better" and 0.99 < apart.low < apart.high == 1
    few = pair_of(np.zeros((4, 5)), Pooled(0.0, 3))
    assert few.verdict == "undecided" and few.more_seeds is None
    assert isinstance(few, PairedDifference)


def test_seeds_help_where_a_look_to_come_may_decide():
    items = np.tile(differences(0.012, 1, 300, rng=np.random.default_rng(2)), (5, 1))
    assert not pair_of(items, Pooled(1e-5, 8), until=True).seeds_help  # see the test of items alone
    assert pair_of(items, Pooled(1e-5, 8)).seeds_help  # seeds that are asked for by number are not held back
    many = np.tile(differences(0.0, 1, 20000), (5, 1))
    near = many + 0.0195 - many.mean()  # at the margin now, but its seeds say little of where it will end
    assert pair_of(near, Pooled(3e-3, 8), until=True).seeds_help
    assert not pair_of(np.ones((4, 1)), Pooled(0.01, 6), until=True).seeds_help  # one item


@pytest.mark.parametrize(("lasting", "least"), [(0.25, 1), (0.6, 50), (2.0, 90)])
def test_pairs_that_are_given_up_would_seldom_have_been_decided(lasting, least):
    """Simulated: of 100 pairs open after five seeds, at most 5 are given up that a later look decides."""
    rng, given_up, lost = np.random.default_rng(3), 0, 0
    for _ in range(100):
        of_items = 0.01 + rng.normal(0, lasting, 1000)
        x = of_items + rng.normal(0, 0.01, 20)[:, None] + rng.normal(0, 0.2, (20, 1000))

        def seen(seeds, x=x):
            return pair_of(x[:seeds], Pooled(float(x[:seeds].mean(1).var(ddof=1)), seeds - 1), until=True)

        now = seen(5)
        if now.verdict == "undecided" and not now.seeds_help:
            given_up += 1
            lost += any(seen(seeds).verdict != "undecided" for seeds in spending.LOOKS[2:])
    assert given_up >= least and lost <= 5
