"""The types of a record: what is read from a file is what is written to it."""

import dataclasses
import json
from pathlib import Path

import pytest

from addenda.comparing.entries import Config, SearchRecord, SplitResult, TrialRecord, Validation, as_json
from addenda.comparing.record import Record
from addenda.core.disk.atomic import readable

RECORD = Path(__file__).parents[2] / "records" / "compare" / "fashion-mnist"


def test_a_committed_record_is_written_as_it_was():
    record = Record.read(RECORD)
    assert as_json(record.config) == json.loads((RECORD / "config.json").read_text())
    files = sorted((RECORD / "trials").glob("*.json"))
    assert len(record.trials) == len(files) > 30
    for trial, file in zip(record.trials, files, strict=True):
        assert trial.name == file.stem
        assert readable(as_json(trial)) == readable(json.loads(file.read_text())), "the order of its fields too"
        assert TrialRecord.of(as_json(trial)) == trial
    assert Config.of(as_json(record.config)) == record.config


def test_a_committed_record_has_its_types():
    record = Record.read(RECORD)
    lora, search = record.config.methods["lora"], record.config.search
    assert (lora.title, lora.steps, lora.trainable) == ("LoRA", 30, 671_242)
    assert search is not None and search.further == 1 and search.first_steps("lora") == 10
    assert record.config.identity is None and record.config.looks is None and not record.config.identified
    run = record.find("lora", "final", seed=0)
    assert run is not None and run.test is not None and run.ood is None and run.tokens_per_second is None
    assert run.test.accuracy == run.test.items.count("1") / len(run.test.items)
    assert run.validation is not None and run.last_look == run.validation[-1][1] and run.on("test") == run.test


def test_what_a_file_does_not_say_has_a_default_and_is_not_written():
    control = {"method": "base", "seed": None, "stage": "control", "status": "ok"}
    trial = TrialRecord.of(control)
    assert as_json(trial) == control and trial.losses is None and trial.last_look is None and trial.on("ood") is None
    least = {"title": "t", "model": {}, "data": {}, "budget": {"value": 4}, "methods": {"lora": {}}, "seeds": [0]}
    config = Config.of(least)
    assert (config.schema, config.notes, config.search, config.methods["lora"].rates) == (1, (), None, None)
    always = {"schema": 1, "created": "", "command": "", "search": None, "versions": {}, "hardware": {}, "notes": []}
    assert as_json(config) == always | least
    assert SearchRecord().first_steps("lora") == SearchRecord(steps=10).first_steps("lora") == 10
    assert SearchRecord(steps={"lora": 7}).first_steps("lora") == 7


def test_what_has_no_field_is_kept():
    value = {"method": "lora", "seed": 0, "stage": "final", "status": "ok", "more": 1, "of": {"mine": [1]},
             "test": {"accuracy": 1.0, "items": "1", "calibration": 0.1}}  # fmt: skip
    trial = TrialRecord.of(value)
    assert trial.more == {"more": 1, "of": {"mine": [1]}} and as_json(trial) == value
    config = {"title": "t", "model": {"name": "m", "licence": "x"}, "data": {}, "budget": {}, "seeds": [0],
              "methods": {"a": {"b": 1}}, "later": True}  # fmt: skip
    assert config.items() <= as_json(Config.of(config)).items()


def test_entries_are_frozen_and_equal_by_value():
    result = SplitResult(accuracy=1.0, items="11")
    assert result == SplitResult(accuracy=1.0, items="11") != SplitResult(accuracy=0.5, items="10")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.accuracy = 0.0  # type: ignore[misc]


def test_numbers_that_are_not_finite_are_written_as_null():
    run = TrialRecord(
        method="a", stage="final", status="diverged", seed=1, losses=((1, float("inf")), (2, 0.5)),
        validation=((2, Validation(loss=float("nan"))),),
    )  # fmt: skip
    written = as_json(run)
    assert written["losses"] == [[1, None], [2, 0.5]]
    assert written["validation"] == [[2, {"loss": None, "accuracy": None}]]


def test_what_was_not_measured_is_null_as_it_was():
    """A run that trained says that its memory is not known; a control, which has none, says nothing of it."""
    look = Validation(loss=1.0)
    trained = TrialRecord(method="lora", stage="final", status="ok", losses=((1, 2.0),), validation=((1, look),))
    written = as_json(trained)
    assert written["peak_bytes"] is None and written["validation"] == [[1, {"loss": 1.0, "accuracy": None}]]
    assert written["seed"] is None and "note" not in written
    assert "peak_bytes" not in as_json(TrialRecord(method="base", stage="control", status="ok"))
