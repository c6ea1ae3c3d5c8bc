"""The search for a rate, driven by runs whose answers are made up."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addenda.comparing.entries import TrialRecord, Validation
from addenda.comparing.search import (
    FURTHER,
    SEEDS,
    Score,
    cost,
    grid,
    last_steps,
    ranked,
    rungs,
    score,
    search,
    side_by_side,
)

ITEMS = 200


def run(look, right, loss=1.0, status="ok"):
    """A run that has the first `right` items right."""
    items = "1" * right + "0" * (ITEMS - right)
    seen = (look.steps, Validation(loss=loss, accuracy=right / ITEMS, items=items))
    return TrialRecord(method="lora", stage="search", status=status, rate=look.rate, steps=look.steps,
                       seed=look.seed, validation=() if status != "ok" else (seen,))  # fmt: skip


def driven(one, run):
    """What a search finds whose runs are made one after another."""
    return side_by_side({"": one}, lambda asked: [run(look) for _, look in asked])[""]


def searched(rates, curve, first=10, last=20, further=FURTHER):
    """What a search over a curve (rate → right items, or None: diverges) chooses, and what it ran."""
    ran = []

    def one(look):
        ran.append(look)
        right = curve(look.rate)
        return run(look, right or 0, status="diverged" if right is None else "ok")

    return driven(search(rates, first, last, further), one), ran


def test_rungs_end_with_two_rates_that_run_half_as_long_as_a_final_run():
    assert grid(1e-3, 5) == (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2) and grid(1e-3, 1) == (1e-3,)
    assert rungs(5, 10, 20) == [(5, 10), (2, 20)] and rungs(3, 10, 500) == [(3, 10), (2, 500)]
    assert rungs(16, 10, 500) == [(16, 10), (8, 20), (4, 40), (2, 500)]
    assert rungs(5, 20, 20) == [(5, 20)] and rungs(2, 5, 20) == [(2, 20)] and rungs(1, 10, 20) == []
    assert [last_steps(first, final) for first, final in [(10, 40), (10, 41), (30, 40)]] == [20, 21, 30]
    assert cost(5, 10, 20, 0) == (14, 180) and cost(5, 10, 20, 4) == (22, 340) and cost(1, 10, 20) == (0, 0)


def test_the_better_half_runs_longer_with_two_seeds():
    chosen, ran = searched((1.0, 2.0, 3.0, 4.0, 5.0), {1.0: 10, 2.0: 90, 3.0: 130, 4.0: 50, 5.0: None}.get)
    assert chosen.rate == 3.0 and chosen.why is None
    assert {(look.rate, look.seed) for look in ran if look.steps == 10} == {(r, s) for r in range(1, 6) for s in SEEDS}
    assert [(look.rate, look.steps) for look in ran[10:]] == [(3.0, 20)] * 2 + [(2.0, 20)] * 2


def test_of_rates_within_one_standard_error_the_lower_loss_wins():
    best = Score(0.60, 1.0, np.array([1.0] * 60 + [0.0] * 40))
    near = Score(0.58, 0.9, np.array([1.0] * 57 + [0.0] * 42 + [1.0]))  # 3 lost, 1 won: 0.02 ± 0.02
    far = Score(0.50, 0.1, np.array([1.0] * 50 + [0.0] * 50))  # 10 lost: 0.10 ± 0.03
    differences = best.items - near.items
    assert math.isclose(differences.mean(), 0.02) and 0.0196 < differences.std(ddof=1) / 10 < 0.0201
    assert ranked({1: best, 2: near, 3: far}) == [2, 1, 3]
    assert ranked({1: best, 3: far}) == [1, 3]
    assert ranked({1: best, 2: Score(-math.inf, math.inf), 3: far}) == [1, 3, 2]
    assert ranked({1: Score(0.6, 1.0), 2: Score(0.59, 0.1)}) == [1, 2], "no items were kept: no error is known"


def test_the_score_of_a_rate_is_the_mean_of_its_seeds():
    looks = [Validation(loss=1.0, accuracy=0.5, items="1100"), Validation(loss=3.0, accuracy=0.25, items="1000")]
    runs = [TrialRecord(method="a", stage="search", status="ok", validation=((5, look),)) for look in looks]
    made = score(runs)
    assert (made.accuracy, made.loss, list(made.items)) == (0.375, 2.0, [1.0, 0.5, 0.0, 0.0])
    lost = TrialRecord(method="a", stage="search", status="diverged", validation=())
    assert score([runs[0], lost]).diverged and not made.diverged
    valueless = TrialRecord(method="a", stage="search", status="ok", validation=((5, Validation(loss=2.0)),))
    assert score([valueless]) == Score(0.0, 2.0, None)


def test_a_best_rate_at_an_edge_is_searched_beyond():
    chosen, ran = searched((1.0, 2.0, 4.0), lambda r: round(180 - abs(r - 16)), further=4)
    assert chosen.rate == 16.0 and {look.rate for look in ran} == {1.0, 2.0, 4.0, 8.0, 16.0, 32.0}
    chosen, ran = searched((64.0, 128.0, 256.0), lambda r: round(180 - 20 * math.log2(r / 4)), further=4)
    assert chosen.rate is None and chosen.why.startswith("the best rate, 4, is the lowest that was tried (up to 256)")
    assert len(ran) == 2 * (3 + 4), "void before any run was long"
    assert searched((3.0,), {}.get)[0].rate == 3.0


def test_an_optimum_that_moves_in_longer_runs_is_followed():
    def one(look):
        return run(look, round(150 - 20 * abs(math.log2(look.rate / (5 if look.steps == 10 else 16)))))

    ran = []
    chosen = driven(search((1.0, 2.0, 4.0, 8.0, 16.0), 10, 20), lambda look: ran.append(look) or one(look))
    assert chosen.rate == 8.0, "of the two that ran long; 16 was tried above it"
    chosen = driven(search((2.0, 4.0, 8.0), 10, 20), one)
    assert chosen.rate == 16.0


def test_an_arm_whose_every_rate_diverges_is_void():
    chosen, ran = searched((1.0, 2.0, 4.0), lambda r: None)
    assert chosen.rate is None and chosen.why == "every rate diverged, from 0.06 to 4"
    assert min(look.rate for look in ran) == 0.06
    chosen, _ = searched((1.0, 2.0, 4.0), lambda r: None if r > 0.3 else round(150 - 100 * abs(r - 0.25)))
    assert chosen.rate == 0.25, "below the grid one does not"


def test_what_diverges_only_in_long_runs_leaves_the_next_lower_rate():
    def one(look):
        lost = look.steps == 20 and look.rate > 1.5
        return run(look, round(150 - 10 * abs(look.rate - 3)), status="diverged" if lost else "ok")

    assert driven(search((0.5, 1.0, 2.0, 3.0, 4.0), 10, 20), one).rate == 1.0


def test_rates_without_any_difference_leave_the_middle_one():
    assert searched(grid(1e-3, 5), lambda r: 50)[0].rate == 1e-3


def test_arms_leave_after_their_first_runs():
    level = {"a": 100, "b": 60, "c": 140, "full": 10}
    asked = []

    def runs(looks):
        asked.append([label for label, _ in looks])
        return [run(look, level[k] - round(10 * abs(math.log2(look.rate)))) for k, look in looks]

    def go(keep):
        asked.clear()
        return side_by_side({k: search((0.5, 1.0, 2.0), 10, 20) for k in level}, runs, keep, ["a", "b", "c"])

    assert {k: c.rate for k, c in go(None).items()} == dict.fromkeys(level, 1.0)
    found = go(2)
    assert {k: c.rate for k, c in found.items()} == {"a": 1.0, "b": None, "c": 1.0, "full": 1.0}
    assert (
        found["b"].why.startswith("left after its first runs, for the time: 30.0% right") and "50.0%" in found["b"].why
    )
    assert "b" in asked[0] and "b" not in asked[1] and list(found) == list(level)
    assert [k for k, c in go(1).items() if c.rate] == ["c", "full"]


@st.composite
def curves(draw):
    """A grid, and a score with one peak, above which runs may diverge."""
    rates = grid(10 ** draw(st.floats(-5, 0)), draw(st.integers(3, 9)))
    peak, width = 10 ** draw(st.floats(-8, 3)), draw(st.floats(1, 40))
    limit = peak * 10 ** draw(st.floats(-1, 3))
    return rates, lambda r: None if r > limit else max(0, round(180 - width * abs(math.log10(r / peak)) * 4))


@settings(max_examples=300, deadline=None)
@given(curves(), st.integers(1, 40), st.integers(1, 200), st.integers(0, 6))
def test_the_winner_lies_between_others_or_the_arm_is_void(made, first, final, further):
    rates, curve = made
    last = last_steps(first, final)
    chosen, ran = searched(rates, curve, first, last, further)
    tried = {look.rate for look in ran}
    assert (chosen.rate is None) == (chosen.why is not None)
    if chosen.rate is not None:
        assert min(tried) < chosen.rate < max(tried) and curve(chosen.rate) is not None
        assert max(look.steps for look in ran if look.rate == chosen.rate) == last >= final / 2
    assert {(look.rate, look.steps, look.seed) for look in ran} == {
        (look.rate, look.steps, seed) for look in ran for seed in SEEDS
    }
    runs, steps = cost(len(rates), first, last, further)
    assert len(ran) <= runs and sum(look.steps for look in ran) <= steps
    assert len(ran) == len({(look.rate, look.steps, look.seed) for look in ran}), "no run is asked for twice"
    again, repeated = searched(rates, curve, first, last, further)
    assert (again, repeated) == (chosen, ran)


@pytest.mark.parametrize("right", [0, ITEMS])
def test_all_right_or_all_wrong_is_decided_by_the_loss(right):
    def one(look):
        return run(look, right, loss=abs(math.log10(look.rate / 3.2e-3)))

    assert driven(search(grid(1e-3, 5), 10, 20), one).rate == 3.2e-3
