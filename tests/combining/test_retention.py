"""What tasks keep: ratios and intervals against simulation, switching, and bad scores."""

import numpy as np
import pytest
import torch

import addenda as ad
import toys
from addenda.combining.retention import Share, kept, retention
from shared import stir


def scores(*shares: float, items: int = 400, runs: int | None = None) -> list[np.ndarray]:
    """Right answers of several models that find the same items hard."""
    rng = np.random.default_rng(0)
    hard = rng.random((runs or 1, items)) * 0.3 + rng.random(items) * 0.7
    made = [(hard < np.quantile(hard, s)).astype(float) for s in shares]
    return made if runs else [m[0] for m in made]


def test_ratios_are_those_of_the_means_inside_of_their_intervals():
    made = kept("a", *scores(0.2, 0.8, 0.6))
    assert (made.base, made.alone, made.combined) == pytest.approx((0.2, 0.8, 0.6), abs=0.01)
    assert made.retained.value == pytest.approx(0.75, abs=0.02) and made.gain.value == pytest.approx(2 / 3, abs=0.02)
    for share in (made.retained, made.gain):
        assert share.low < share.value < share.high < 1
    assert made.items == 400 and made.runs == 1


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(60):
        alone = rng.random(150) < 0.8
        combined = alone & (rng.random(150) < 0.9)
        made = kept("a", np.zeros(150), alone.astype(float), combined.astype(float))
        covered += made.retained.low <= 0.9 <= made.retained.high
    assert covered >= 52, "95 % of 60 are 57"


def test_seeds_widen_an_interval():
    base, alone, combined = scores(0.2, 0.8, 0.6, runs=3)
    one = kept("a", base, alone, combined)
    combined = combined.copy()
    combined[0] = 0
    apart = kept("a", base, alone, combined)
    assert one.runs == 3 and apart.retained.high - apart.retained.low > 3 * (one.retained.high - one.retained.low)


def test_no_gain_and_no_score():
    made = kept("a", *scores(0.79, 0.8, 0.6, items=50))
    assert made.gain is None and made.retained is not None
    assert kept("a", *scores(0.0, 0.0, 0.5)).retained is None


def test_each_task_is_judged_with_base_own_and_combined_and_what_acted_acts_again():
    model = toys.Tiny()
    for n, seed in (("a", 1), ("b", 2), ("both", 3)):
        stir(ad.attach(model, "lora:rank=2", targets="linear", name=n), 0.1, seed)
    ad.switch(model, "b")
    seen = []

    def judge(m):
        seen.append(ad.status(m))
        return [1.0, 0.0, 1.0] * 10

    made = retention(model, "both", {"a": judge, "b": judge})
    acting = [next((line.split(":")[0].strip() for line in s.splitlines() if "active" in line), None) for s in seen]
    assert acting == [None, "a", "both", None, "b", "both"]
    assert "b: active" in ad.status(model) and made.tasks[0].retained == Share(1.0, 1.0, 1.0)
    assert max(map(len, str(made).splitlines())) <= 80 and "no gain" in str(made)


def test_bad_input_leaves_what_acts():
    model = toys.Tiny()
    stir(ad.attach(model, "lora:rank=2", targets="linear", name="a"), 0.1)
    with pytest.raises(ad.AddendaError, match="No adapter is called 'c'"):
        retention(model, "c", {"a": lambda m: [1.0]})
    with pytest.raises(ad.AddendaError, match="tasks is empty"):
        retention(model, "a", {})
    counts = iter(([1.0], [1.0, 2.0], [1.0]))
    with pytest.raises(ad.AddendaError, match="the same items each time"):
        retention(model, "a", {"a": lambda m: next(counts)})
    with pytest.raises(ad.AddendaError, match="finite"):
        retention(model, "a", {"a": lambda m: [float("nan")]})
    assert "a: active" in ad.status(model) and bool(torch.isfinite(model(torch.zeros(1, 2, dtype=torch.long))).all())


@pytest.mark.parametrize("scores", [0.5, None, ["a"], [[1], [1, 2]], {"a": 1.0}], ids=str)
def test_what_is_no_list_of_scores_is_said_with_the_task_and_leaves_what_acts(scores):
    model = toys.Tiny()
    stir(ad.attach(model, "lora:rank=2", targets="linear", name="a"), 0.1)
    with pytest.raises(ad.AddendaError, match="The judge of 'a' must return a list of scores"):
        retention(model, "a", {"a": lambda m: scores})
    assert "a: active" in ad.status(model)


def test_tasks_are_functions_by_name(tiny):
    ad.attach(tiny, "lora", name="a")
    with pytest.raises(ad.AddendaError, match="tasks must be a dict, got a list"):
        retention(tiny, "a", ["a"])
    with pytest.raises(ad.AddendaError, match=r"function that scores its items\}; got \{'a': 0.5\}"):
        retention(tiny, "a", {"a": 0.5})
