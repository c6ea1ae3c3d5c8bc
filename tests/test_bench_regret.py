"""`python -m bench regret`: planted accuracies are what is planted, and regrets are counted as the page says."""

import numpy as np
import pytest
from bench import regret


def test_what_is_planted_is_what_arms_reach():
    """The mean over many items and seeds is the accuracy, with the difficulty of items shared by all arms."""
    rng = np.random.default_rng(5)
    record, truth = regret.planted(rng, seeds=8, items=20_000, shared=0.65, scatter=0.5)
    for arm, accuracy in truth.items():
        runs = [t.test.accuracy for t in record.trials_of(arm, "final") if t.test]
        assert len(runs) == 8
        assert 100 * np.mean(runs) == pytest.approx(accuracy, abs=1.0)  # items alone: 0.35 at 50 %
    answers = {t.method: np.array(list(t.test.items), float) for t in record.trials if t.test and t.seed in (0, None)}
    assert np.corrcoef(answers["m0"], answers["m1"])[0, 1] > 0.2, "an item that is hard is hard for both"


def test_seeds_scatter_as_asked_and_share_their_order():
    rng = np.random.default_rng(6)
    pairs = []
    for _ in range(60):
        record, _ = regret.planted(rng, seeds=2, items=2000, shared=0.65, scatter=6.0)
        a, b = ([t.test.accuracy for t in record.trials_of(m, "final") if t.test] for m in ("m0", "m1"))
        pairs.append((a[1] - a[0], b[1] - b[0]))
    x = 100 * np.array(pairs)
    assert x.std(0)[0] / 2**0.5 == pytest.approx(6.0, rel=0.3)
    assert np.corrcoef(x.T)[0, 1] == pytest.approx(0.65, abs=0.25)


def test_regret_is_counted_where_arms_differ_enough():
    record, truth = regret.planted(np.random.default_rng(0), seeds=8, items=4800, shared=0.0, scatter=0.5)
    assert regret.tally(record, {"m0": 50.0, "m1": 46.0}) == regret.Tally([]), "not more than two margins"
    far = {arm: 50.0 - 5 * i for i, arm in enumerate(truth)}
    (found,) = regret.tally(record, far).regrets
    assert found in {0.0, 5.0, 10.0, 15.0}
    whole = regret.Tally([0.5, 2.0, 2.5], 1) + regret.Tally([0.0], 2)
    assert whole.as_row("x") == {
        "what": "x", "records": 7, "nothing": 3, "chosen": 4, "within": 3, "mean": 1.25, "most": 2.5
    }  # fmt: skip


def test_kept_records_are_parted_into_seeds_that_choose_and_seeds_that_judge():
    found = dict(regret.kept())
    assert "sort-numbers" in found
    parts = list(regret.parted(found["sort-numbers"]))
    assert [part.config.seeds for part, _ in parts] == [(0, 1), (0, 2), (1, 2)]
    part, truth = parts[0]
    assert {t.seed for t in part.trials if t.stage == "final"} == {0, 1}
    held = found["sort-numbers"].find("lora", "final", seed=2)
    assert held is not None and held.test is not None
    assert truth["lora"] == pytest.approx(100 * held.test.accuracy)
    assert "full" not in truth
