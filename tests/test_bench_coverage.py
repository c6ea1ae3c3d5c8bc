"""What the simulation of coverage computes for many draws at once is what a comparison says of one."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from bench import coverage

from addenda.comparing.entries import BudgetRecord, Config, DataRecord, MethodRecord, ModelRecord, TrialRecord
from addenda.comparing.record import Record
from addenda.comparing.stats import analyse


def record_of(x: np.ndarray, control: np.ndarray) -> Record:
    def trial(arm: str, stage: str, seed: int | None, row: np.ndarray) -> TrialRecord:
        test = {"accuracy": float(row.mean()), "loss": 1.0, "items": "".join("01"[int(v)] for v in row)}
        return TrialRecord.of({"method": arm, "stage": stage, "seed": seed, "status": "ok", "test": test})

    trials = [trial(f"m{a}", "final", s, row) for a, rows in enumerate(x) for s, row in enumerate(rows)]
    methods = {f"m{a}": MethodRecord() for a in range(len(x))}
    config = Config(
        title="", model=ModelRecord(), data=DataRecord(), budget=BudgetRecord(), methods=methods, seeds=(0,)
    )
    return Record(Path("memory"), config, (*trials, trial("base", "control", None, control)))


@pytest.mark.parametrize(("arms", "spread"), [(2, 0.3), (4, 0.0), (4, [0.1, 0.1, 3.0, 0.1])])
def test_one_draw_is_what_a_comparison_says(arms, spread):
    latent = coverage.Latent(np.random.default_rng(arms), 3, arms, 6, 150, 0.5)
    x = latent.answers(np.reshape(spread, (-1, 1, 1)), 0.3)
    found = coverage.measured(x, latent.control)
    for draw in range(3):
        said = analyse(record_of(x[draw], latent.control[draw]))
        for i, (a, b) in enumerate(combinations(range(arms), 2)):
            pair = said.between(f"m{a}", f"m{b}")
            assert pair is not None
            numbers = [v[draw, i] for v in found["pair"]]
            assert numbers == pytest.approx([pair.difference, pair.error, pair.df], rel=1e-4, abs=1e-7)
        for a in range(arms):
            pair, arm = said.between(f"m{a}", "base"), said.test[f"m{a}"]
            assert pair is not None
            numbers = [v[draw, a] for v in found["control"]]
            assert numbers == pytest.approx([pair.difference, pair.error, pair.df], rel=1e-4, abs=1e-7)
            half = coverage.half((found["arm"][0], found["arm"][1], found["arm"][2]), 0.05)[draw, a]
            assert min(found["arm"][0][draw, a] + half, 1) == pytest.approx(arm.high, rel=1e-4)
    if arms == 4 and spread:
        assert coverage.uneven(x.mean(3)).any()


def test_gains_are_the_margin_in_accuracy():
    rng = np.random.default_rng(0)
    gain = coverage._gains(2, 0.5, 1.0)
    sd = (coverage.DIFFICULTY**2 + 0.5**2 + 1) ** 0.5
    latent = sd * rng.standard_normal(2_000_000)
    right = 1 / (1 + np.exp(-latent - gain[0]))
    assert right.mean() - 0.5 == pytest.approx(coverage.MARGIN, abs=1e-3)
    assert gain[1] == 0


def test_a_small_simulation_holds_its_levels():
    rng = np.random.default_rng(1)
    rows = coverage.coverage(rng, 300, 3, 4, 200, 0.5)
    assert all(0.9 < r[k] < 0.99 for r in rows for k in ("pair", "control", "arm"))
    looked = coverage.looks(rng, 300, 2, 500, 0.0)
    assert all(r["told_apart"] <= 0.1 and r["told_apart"] <= r["without_spending"] for r in looked)
    assert all(r["wrongly_equivalent"] <= 0.1 for r in looked)
    text = coverage.table(300, 300, [r | {"arms": 2, "seeds": 3, "items": 500} for r in rows], looked)
    assert "| 2 | 3 | 500 |" in text and "| 2 | 500 |" in text
