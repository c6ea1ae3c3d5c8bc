"""Statistics against independent derivations, scipy's own tests, and simulations of a known truth."""

import itertools
import math
from dataclasses import replace
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


# --- special cases by hand ---------------------------------------------------------------------------------


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


def test_a_pair_is_the_paired_analysis_of_variance():
    """Every number of a pair anew, from sums of squares of all arms, items and seeds."""
    x = simulate(np.random.default_rng(1), 3, 4, 200, 0.08, gain=0.1)
    arms, d = np.stack(list(x.values())).astype(float), x["m0"].astype(float) - x["m1"]
    pair = stats.analyse(record(x)).between("m0", "m1")
    runs = arms.mean(2)
    rest = runs - runs.mean(0) - runs.mean(1, keepdims=True) + runs.mean()
    of_seeds = 2 * (rest**2).sum() / 6 / 4
    of_items = d.mean(0).var(ddof=1) / 200
    both = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    shared = (both**2).sum() / (199 * 3) / 800
    lasting = max(of_items - shared, 0)
    variance = lasting + of_seeds
    df = 1 / ((of_seeds / variance) ** (2 - 2.3 / 6) / 6 + (lasting / variance) ** 2 / 199)
    assert pair.difference == pytest.approx(d.mean())
    assert (pair.error, pair.df) == pytest.approx((variance**0.5, df))
    low, high = scipy_stats.t.interval(0.95, df, d.mean(), variance**0.5)
    assert (pair.low, pair.high) == pytest.approx((low, high))
    assert pair.p == pytest.approx(2 * scipy_stats.t.sf(abs(d.mean()) / variance**0.5, df))


def test_what_a_seed_does_to_all_arms_is_no_part_of_a_difference():
    rng = np.random.default_rng(2)
    x = simulate(rng, 3, 4, 400, 0.0)
    shared = {k: np.where(np.arange(4)[:, None] == 2, v & (rng.random(400) < 0.5), v) for k, v in x.items()}
    keep = rng.random(400) < 0.5
    shared = {k: np.where(np.arange(4)[:, None] == 2, v & keep, v) for k, v in x.items()}
    found, bad = stats.analyse(record(x)), stats.analyse(record(shared, {"base": rng.random(400) < 0.1}))
    assert bad.pair("m0", "m1").error < 1.3 * found.pair("m0", "m1").error
    assert bad.test["m0"].high - bad.test["m0"].low > 3 * (found.test["m0"].high - found.test["m0"].low)
    assert bad.pair("m0", "base").error > 3 * bad.pair("m0", "m1").error  # the base has no seed


@pytest.mark.parametrize(("name", "most"), [("sort-numbers", 0.115), ("demo", 0.098)])
def test_records_of_before_say_more_than_they_did(name, most):
    read = Record.read(Path(__file__).parents[2] / "records" / name)
    found = stats.analyse(read)
    arms = [p for p in found.pairs if {p.a, p.b} <= set(read.config.methods)]
    assert len(arms) >= 3
    assert max((p.high - p.low) / 2 for p in arms) <= most


# --- simulations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arms", "seeds", "spread"), [(2, 3, 0.05), (4, 3, 0.03), (3, 5, 0.0)])
def test_intervals_cover_and_equal_methods_are_not_separated(arms, seeds, spread):
    rng, runs = np.random.default_rng(5), 200
    covered, familywise = [], 0
    for _ in range(runs):
        found = stats.analyse(record(simulate(rng, arms, seeds, 200, spread)))
        covered += [p.low <= 0 <= p.high for p in found.pairs]
        familywise += any(p.better for p in found.pairs)
    assert 0.92 <= np.mean(covered) <= 0.985
    assert familywise / runs <= 0.07


def test_testing_items_alone_would_be_wrong():
    """The reason for the seed variance: with it left out, equal methods differ 'significantly' far too often."""
    rng, naive, ours = np.random.default_rng(6), 0, 0
    for _ in range(200):
        x = simulate(rng, 4, 3, 300, 0.05)
        naive += scipy_stats.ttest_rel(x["m0"].mean(0), x["m1"].mean(0)).pvalue < 0.05
        ours += stats.analyse(record(x)).pair("m0", "m1").p < 0.05
    assert naive / 200 > 0.2
    assert ours / 200 <= 0.1


def test_a_real_difference_is_found():
    rng, hits, runs = np.random.default_rng(7), 0, 60
    for _ in range(runs):
        found = stats.analyse(record(simulate(rng, 4, 3, 300, 0.01, gain=0.2)))
        hits += found.leaders == ("m0",)
    assert hits / runs >= 0.9


# --- what a record may hold --------------------------------------------------------------------------------


def test_verdicts_in_words_and_the_better_control():
    rng = np.random.default_rng(8)
    x = simulate(rng, 3, 4, 250, 0.01, gain=0.3)
    controls = {"base": rng.random(250) < 0.1, "base 8-shot": rng.random(250) < 0.3}
    found = stats.analyse(record(x, controls))
    assert found.control == "base 8-shot"
    assert found.beats("m0", "base 8-shot")
    assert "base" in found.test
    assert "base" not in found.letters
    assert "m0 better than m1 by" in found.pair("m1", "m0").words()
    assert found.between("m1", "m0").verdict == "worse"
    equal = found.pair("m1", "m2")
    assert equal.better is None
    assert "M1" in equal.words({"m1": "M1", "m2": "M2"})
    assert stats.analyse(record(x, controls)) == found


def test_not_worse_is_by_the_margin_of_the_record():
    x = simulate(np.random.default_rng(9), 2, 5, 4000, 0.0)
    ours = record(x)
    found = stats.analyse(ours)
    assert found.margin == 0.02
    assert found.not_worse("m0", "m1") and found.not_worse("m1", "m0") and found.not_worse("m0", "m0")
    assert not found.not_worse("m0", "nothing")
    strict = stats.analyse(replace(ours, config=replace(ours.config, margin=0.01)))
    assert strict.margin == 0.0001
    assert not (strict.not_worse("m0", "m1") and strict.not_worse("m1", "m0"))
    assert strict.pairs[0].margin == 0.0001


def test_a_comparison_until_decided_is_one_look_of_several():
    ours = record(simulate(np.random.default_rng(10), 3, 5, 300, 0.02, gain=0.1))
    once = stats.analyse(ours).pairs[0]
    often = stats.analyse(replace(ours, config=replace(ours.config, until="decided"))).pairs[0]
    assert often.error == once.error
    assert often.high - often.low > 1.1 * (once.high - once.low)
    assert often.p > once.p


def test_one_seed_decides_nothing():
    x = simulate(np.random.default_rng(9), 2, 1, 100, 0.0, gain=0.4)
    found = stats.analyse(record(x))
    assert "not about the methods" in found.caveats[0]
    assert found.control is None
    assert found.pairs[0].verdict == "undecided"
    assert found.leaders == ("m0", "m1")


def test_one_item_decides_nothing():
    found = stats.analyse(record({"a": np.ones((3, 1)), "b": np.zeros((3, 1))}))
    assert found.pairs[0].verdict == "undecided"
    assert "one item" in found.pairs[0].words()
    assert found.test["a"].low < 0.1


def test_a_diverged_run_counts_as_all_wrong_and_never_leads():
    x = simulate(np.random.default_rng(10), 3, 2, 200, 0.0)
    found = stats.analyse(record(x, diverged={("m1", 1)}))
    assert found.diverged == {"m1": (1,)}
    assert found.void == {}
    assert found.test["m1"].mean == pytest.approx(x["m1"][0].mean() / 2)
    assert "m1" not in found.leaders
    assert "m1: 1 of 2 runs diverged" in found.caveats[0]
    sound, alone = found.test["m0"], stats.analyse(record({k: x[k] for k in ("m0", "m2")})).test["m0"]
    assert (sound.low, sound.high) == pytest.approx((alone.low, alone.high))  # its scatter does not spoil the others


def test_an_arm_whose_every_run_diverged_is_void_and_others_go_on():
    x = simulate(np.random.default_rng(11), 3, 3, 200, 0.0, gain=0.4)
    found = stats.analyse(record(x, diverged={("m1", s) for s in range(3)}))
    assert found.void == {"m1": "every run diverged"}
    assert found.pair("m0", "m1").verdict == "void"
    assert "m1 is void: every run diverged" in found.pair("m0", "m1").words()
    assert found.beats("m0", "m2") and found.leaders == ("m0",)
    assert "m1" not in found.letters and not found.not_worse("m1", "m0") and not found.not_worse("m0", "m1")
    alone = stats.analyse(record({k: x[k] for k in ("m0", "m2")}))
    assert found.pair("m0", "m2") == alone.pair("m0", "m2")


def test_a_search_may_make_an_arm_void():
    ours = record(simulate(np.random.default_rng(12), 3, 3, 200, 0.0))
    methods = dict(ours.config.methods) | {"m2": MethodRecord(title="M2", void="the best rate is at an edge")}
    found = stats.analyse(replace(ours, config=replace(ours.config, methods=methods)))
    assert found.void == {"m2": "the best rate is at an edge"}
    assert "m2" not in found.leaders
    assert {p.verdict == "void" for p in found.pairs if "m2" in (p.a, p.b)} == {True}


def test_identical_answers_and_seeds_that_do_not_meet():
    x = np.stack([np.arange(100) % 2, np.arange(1, 101) % 2])  # seeds of equal means
    pair = stats.analyse(record({"a": x, "b": x.copy()})).pairs[0]
    assert (pair.difference, pair.p, pair.better) == (0, 1, None)
    assert -0.05 < pair.low < 0 < pair.high < 0.05
    apart = record({"a": x[:1], "b": x})
    apart = Record(apart.path, apart.config, tuple(t for t in apart.trials if t.method == "a" or t.seed == 1))
    lonely = stats.analyse(apart).pairs[0]
    assert lonely.better is None
    assert math.isinf(lonely.error)
    assert "no seed that both" in lonely.words()


def test_nothing_finished_is_an_error():
    with pytest.raises(AddendaError, match="no finished run"):
        stats.analyse(record({"a": np.zeros((0, 4))}))
