"""Statistics against independent derivations, scipy's own tests, and simulations of a known truth."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from addenda.comparing import stats
from addenda.comparing.entries import BudgetRecord, Config, DataRecord, MethodRecord, ModelRecord, TrialRecord
from addenda.comparing.record import Record
from addenda.core.base.errors import AddendaError


def record(arms, controls=None, ood=None, seeds=None, diverged=()):
    """A record in memory from {arm: seeds × items of 0/1} and {control: items}."""
    trials = []

    def split(x):
        return {"accuracy": float(np.mean(x)), "loss": 1.0, "items": "".join("01"[int(v)] for v in x)}

    for arm, x in arms.items():
        for s, row in enumerate(x):
            lost = (arm, s) in diverged
            trial = {"method": arm, "stage": "final", "seed": s, "status": "diverged" if lost else "ok"}
            trials.append(trial if lost else trial | {"test": split(row)})
    for arm, row in (controls or {}).items():
        trials.append({"method": arm, "stage": "control", "seed": None, "status": "ok", "test": split(row)})
    config = Config(
        title="simulated", model=ModelRecord(), data=DataRecord(), budget=BudgetRecord(), seeds=(0, 1),
        methods={arm: MethodRecord(title=arm.upper()) for arm in arms},
    )  # fmt: skip
    return Record(Path("memory"), config, tuple(map(TrialRecord.of, trials)))


def simulate(rng, arms, seeds, items, seed_spread, gain=0.0):
    """0/1 outcomes, arms × seeds × items: shared item difficulties, a shift per (arm, seed), a gain of arm 0."""
    p = 0.5 + rng.normal(0, 0.25, items) + rng.normal(0, seed_spread, (arms, seeds, 1))
    p[0] += gain
    return {f"m{k}": x for k, x in enumerate(rng.random((arms, seeds, items)) < np.clip(p, 0.01, 0.99))}


# --- special cases against scipy and by hand ---------------------------------------------------------------


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 0), (9, 2), (30, 14), (400, 350)])
def test_sign_flip_of_one_seed_is_mcnemar(won, lost):
    expected = scipy_stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert stats.sign_flip([1] * won + [-1] * lost + [0] * 7) == pytest.approx(expected, rel=1e-9)


def test_sign_flip_of_several_seeds_is_the_full_enumeration():
    rng = np.random.default_rng(0)
    for _ in range(20):
        d = rng.integers(-3, 4, 9)
        flips = np.array(list(itertools.product((-1, 1), repeat=len(d)))) @ d
        assert stats.sign_flip(d) == pytest.approx(np.mean(np.abs(flips) >= abs(d.sum())))
    d = rng.integers(-2, 4, 11)
    permuted = scipy_stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert stats.sign_flip(d) == pytest.approx(permuted.pvalue)


def test_one_seed_is_the_paired_t_and_mcnemar():
    rng = np.random.default_rng(1)
    x = simulate(rng, 2, 1, 300, 0.0, gain=0.08)
    pair = stats.analyse(record(x)).pairs[0]
    a, b = x[pair.a][0].astype(float), x[pair.b][0].astype(float)
    exact = scipy_stats.binomtest(int((a > b).sum()), int((a != b).sum())).pvalue
    assert pair.p == pytest.approx(max(exact, scipy_stats.ttest_rel(a, b).pvalue))
    t = scipy_stats.ttest_rel(a, b).confidence_interval()
    assert pair.low <= t.low
    assert pair.high >= t.high
    assert pair.high - pair.low < 1.25 * (t.high - t.low)


def test_seeds_that_swamp_the_items_give_the_t_interval_of_the_seed_means():
    x = np.repeat([[1.0], [0.0], [1.0], [1.0]], 50, axis=1)
    error, df = stats._spread(x, 0.0, 0)
    low, high = scipy_stats.t.interval(0.95, df, 0.75, error)
    expected = scipy_stats.ttest_1samp([1, 0, 1, 1], 0).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_variance_is_that_of_a_crossed_random_model():
    rng = np.random.default_rng(2)
    seeds, items, found = 4, 60, []
    for _ in range(400):
        x = rng.normal(0, 0.5, items) + rng.normal(0, 0.2, (seeds, 1)) + rng.normal(0, 1, (seeds, items))
        found.append(stats._spread(x, 0.0, 0)[0] ** 2)
    truth = 0.25 / items + 0.04 / seeds + 1 / (seeds * items)
    assert np.mean(found) == pytest.approx(truth, rel=0.12)


def test_bootstrap_of_one_seed_is_scipys():
    x = np.random.default_rng(3).random((1, 150)) < 0.7
    weights = stats._draws(150, 4000, 1)
    low, high = np.quantile(weights @ x[0], [0.025, 0.975])
    theirs = scipy_stats.bootstrap((x[0],), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.012)
    assert np.allclose(weights.sum(1), 1)


def test_holm_textbook_example():
    ps = (0.01, 0.04, 0.03, 0.005)
    found = [(stats.PairedDifference("a", "b", 0.1, 0.0, 0.2, p, p, 0.0, 100, 2), 0.02, 99.0) for p in ps]
    assert [p.p_holm for p in stats._holm(found)] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_an_arm_with_nothing_right_has_clopper_pearson_s_interval():
    found = stats.analyse(record({"a": np.zeros((2, 80)), "b": np.ones((2, 80))}))
    expected = scipy_stats.binomtest(0, 80).proportion_ci(method="exact")
    assert found.test["a"].high == pytest.approx(expected.high)
    assert found.test["b"].low == pytest.approx(1 - expected.high)
    assert found.pairs[0].better == "b"


def test_letters_are_shared_exactly_by_those_not_told_apart():
    assert stats.letters(["x", "y", "z"], []) == {"x": "a", "y": "a", "z": "a"}
    assert stats.letters(["x", "y", "z"], [("x", "z")]) == {"x": "a", "y": "ab", "z": "b"}
    rng = np.random.default_rng(4)
    for _ in range(50):
        names = [f"m{i}" for i in range(7)]
        different = [p for p in itertools.combinations(names, 2) if rng.random() < 0.4]
        shown = stats.letters(names, different)
        for a, b in itertools.combinations(names, 2):
            assert bool(set(shown[a]) & set(shown[b])) == ((a, b) not in different)
        assert "a" in shown["m0"]


# --- simulations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arms", "seeds", "spread"), [(2, 2, 0.05), (4, 2, 0.03), (3, 3, 0.0)])
def test_intervals_cover_and_equal_methods_are_not_separated(arms, seeds, spread):
    rng, runs = np.random.default_rng(5), 200
    covered, told_apart, familywise = [], [], 0
    for _ in range(runs):
        found = stats.analyse(record(simulate(rng, arms, seeds, 200, spread)), draws=300)
        covered += [e.low <= 0.5 <= e.high for e in found.test.values()]
        told_apart += [p.low > 0 or p.high < 0 for p in found.pairs]
        familywise += any(p.better for p in found.pairs)
    assert 0.93 <= np.mean(covered) <= 0.999
    assert np.mean(told_apart) <= 0.06
    assert familywise / runs <= 0.06


def test_testing_items_alone_would_be_wrong():
    """The reason for the seed variance: with it left out, equal methods differ 'significantly' far too often."""
    rng, naive, ours = np.random.default_rng(6), 0, 0
    for _ in range(100):
        x = simulate(rng, 4, 2, 300, 0.05)
        naive += stats.sign_flip((x["m0"].astype(int) - x["m1"]).sum(0)) < 0.05
        ours += stats.analyse(record(x), draws=100).pair("m0", "m1").p < 0.05
    assert naive / 100 > 0.2
    assert ours / 100 <= 0.08


def test_a_real_difference_is_found_and_the_promised_one_is_detectable():
    rng, hits, at_limit, limits, runs = np.random.default_rng(7), 0, 0, [], 60
    for _ in range(runs):
        found = stats.analyse(record(simulate(rng, 4, 3, 300, 0.01, gain=0.2)), draws=200)
        hits += found.leaders == ("m0",)
        limits.append(found.pair("m2", "m3").detectable)
    limit = float(np.median(limits))
    for _ in range(runs):
        found = stats.analyse(record(simulate(rng, 4, 3, 300, 0.01, gain=limit)), draws=200)
        at_limit += found.beats("m0", "m1")
    assert hits / runs >= 0.9
    assert 0.03 < limit < 0.2
    assert 0.65 <= at_limit / runs <= 0.97


# --- what a record may hold --------------------------------------------------------------------------------


def test_verdicts_in_words_and_the_better_control():
    rng = np.random.default_rng(8)
    x = simulate(rng, 3, 2, 250, 0.01, gain=0.3)
    controls = {"base": rng.random(250) < 0.1, "base 8-shot": rng.random(250) < 0.3}
    found = stats.analyse(record(x, controls))
    assert found.control == "base 8-shot"
    assert found.beats("m0", "base 8-shot")
    assert "base" in found.test
    assert "base" not in found.letters
    assert "m0 better than m1 by" in found.pair("m1", "m0").words()
    equal = found.pair("m1", "m2")
    assert equal.better is None
    assert f"about {equal.detectable * 100:.0f} points or more" in equal.words()
    assert "M1" in equal.words({"m1": "M1", "m2": "M2"})
    assert abs(equal.difference) < equal.detectable
    assert stats.analyse(record(x, controls)) == found


def test_one_seed_speaks_of_runs_only():
    x = simulate(np.random.default_rng(9), 2, 1, 100, 0.0)
    found = stats.analyse(record(x))
    assert "not about the methods" in found.caveats[0]
    assert found.control is None


def test_a_diverged_run_counts_as_all_wrong_and_never_leads():
    x = simulate(np.random.default_rng(10), 3, 2, 200, 0.0)
    found = stats.analyse(record(x, diverged={("m1", 1)}))
    assert found.diverged == {"m1": (1,)}
    assert found.test["m1"].mean == pytest.approx(x["m1"][0].mean() / 2)
    assert "m1" not in found.leaders
    assert "m1: 1 of 2 runs diverged" in found.caveats[0]
    sound, alone = found.test["m0"], stats.analyse(record({k: x[k] for k in ("m0", "m2")})).test["m0"]
    assert (sound.low, sound.high) == pytest.approx((alone.low, alone.high))  # its scatter does not spoil the others


def test_identical_answers_and_seeds_that_do_not_meet():
    x = np.stack([np.arange(100) % 2, np.arange(1, 101) % 2])  # seeds of equal means
    pair = stats.analyse(record({"a": x, "b": x.copy()})).pairs[0]
    assert (pair.difference, pair.p, pair.better) == (0, 1, None)
    assert -0.05 < pair.low < 0 < pair.high < 0.05
    assert 0 < pair.detectable < 0.1
    apart = record({"a": x[:1], "b": x})
    apart = Record(apart.path, apart.config, tuple(t for t in apart.trials if t.method == "a" or t.seed == 1))
    lonely = stats.analyse(apart).pairs[0]
    assert lonely.better is None
    assert math.isinf(lonely.detectable)
    assert "too few" in lonely.words()


def test_nothing_finished_is_an_error():
    with pytest.raises(AddendaError, match="no finished run"):
        stats.analyse(record({"a": np.zeros((0, 4))}))
