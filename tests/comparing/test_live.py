"""What is shown of the runs of a comparison while they end."""

import math

import pytest
from rich.console import Console

from addenda.comparing.entries import (
    BudgetRecord,
    Config,
    DataRecord,
    MethodRecord,
    ModelRecord,
    SplitResult,
    TrialRecord,
    Validation,
)
from addenda.comparing.live import Board
from addenda.comparing.record import Record

CONFIG = Config(
    title="t", model=ModelRecord(name="m", parameters=1), data=DataRecord(name="d", description="", metric="accuracy"),
    budget=BudgetRecord(kind="steps", value=4, steps=4, batch=1), methods={"lora": MethodRecord(title="LoRA")},
    seeds=(0,), hardware={}, versions={},
)  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("loss", "said"), [(1.5, "1.500"), (math.nan, "not finite"), (math.inf, "not finite"), (None, "not finite")]
)
def test_a_search_run_that_ended_is_told_with_its_validation_loss(loss, said, terminal, tmp_path):
    run = TrialRecord(
        method="lora", seed=1000, stage="search", rate=1.0, steps=4, status="ok", losses=((1, 2.0),),
        validation=((4, Validation(loss=loss, accuracy=0.5, items="01")),),
    )  # fmt: skip
    board = Board(Console(width=200, force_terminal=terminal, record=True))
    with board:
        board.trial("lora", "search", 1000, 1.0)
        board.done(Record.write_config(tmp_path, CONFIG).write_trial(run))
    if not terminal:
        assert f"lora searching, rate 1: ok, validation loss {said}" in board.console.export_text()


def test_a_final_run_that_ended_is_told_with_its_test(tmp_path):
    record = Record.write_config(tmp_path, CONFIG)
    board = Board(Console(width=200, force_terminal=False, record=True))
    board.trial("lora", "final", 0, 1.0)
    for seed, status, test in ((0, "ok", SplitResult(accuracy=0.5, items="01", loss=math.nan)), (1, "diverged", None)):
        record = record.write_trial(
            TrialRecord(method="lora", seed=seed, stage="final", rate=1.0, steps=4, status=status, test=test)
        )
        board.done(record)
    said = board.console.export_text()
    assert "ok, test 50.0%" in said and "seed 1, rate 1: diverged" in said
