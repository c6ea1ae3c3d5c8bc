"""The record directory: atomic, resumable, strict about what it holds."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from addenda.comparing.entries import Config, SplitResult, TrialRecord, as_json, trial_name
from addenda.comparing.record import Record
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import DiskError


def config(**changes):
    return Config.of({
        "title": "A test",
        "created": "2025-06-01T00:00:00Z",
        "command": "addenda compare",
        "model": {"name": "tiny", "parameters": 1000, "dtype": "bfloat16"},
        "data": {"name": "sums", "description": "small", "sizes": {"test": 4}, "hashes": {"test": "ab"}},
        "budget": {"kind": "steps", "value": 40, "steps": 40, "batch": 16},
        "methods": {"lora": {"title": "LoRA", "options": {"rank": 8}}, "lora+": {"title": "LoRA+", "options": {}}},
        "seeds": [0, 1],
        "hardware": {"cpu": "x"},
        **changes,
    })  # fmt: skip


HALF = SplitResult(accuracy=0.5, loss=1.0, items="0101")


def trial(**changes):
    known = {
        "method": "lora", "seed": 0, "stage": "final", "rate": 1e-3, "steps": 40, "test": HALF, "ood": HALF,
        "losses": ((1, 2.0),), "status": "ok", "note": "",
    }  # fmt: skip
    return TrialRecord(**known | changes)


def test_what_is_written_is_read(tmp_path):
    record = Record.write_config(tmp_path / "run", config()).write_trial(trial()).write_trial(trial(seed=1))
    again = Record.read(tmp_path / "run")
    assert again == record
    assert [t.seed for t in again.trials_of("lora", "final")] == [0, 1]
    assert not again.trials_of("lora+")


def test_find_knows_what_is_done(tmp_path):
    record = Record.write_config(tmp_path, config()).write_trial(trial())
    for steps in (10, 20):
        record = record.write_trial(trial(stage="search", steps=steps, test=None, ood=None))
    record = record.write_trial(trial(method="base 8-shot", seed=None, stage="control", rate=None, steps=None))
    record = Record.read(tmp_path)
    assert record.find("lora", "final", seed=0).rate == 1e-3
    assert record.find("lora", "final", seed=1) is None
    assert record.find("lora", "search", seed=0, rate=0.1 * 0.01, steps=20).steps == 20
    assert record.find("lora", "search", seed=0, rate=1e-3, steps=40) is None
    assert record.find("lora", "search", seed=0, rate=2e-3) is None
    assert record.find("base 8-shot", "control") is not None
    assert record.find("base", "control") is None


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    record = Record.write_config(tmp_path, config())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        record.write_trial(trial())
    assert list((tmp_path / "trials").iterdir()) == []


def test_a_half_written_file_is_ignored_and_done_again(tmp_path):
    record = Record.write_config(tmp_path, config()).write_trial(trial())
    file = tmp_path / "trials" / f"{trial().name}.json"
    file.write_text(file.read_text()[:50])
    record = Record.read(tmp_path)
    assert record.trials == ()
    assert record.ignored == (file.name,)
    assert record.write_trial(trial()).ignored == ()
    assert len(Record.read(tmp_path).trials) == 1


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file whose reading the system refuses")
def test_what_the_disk_does_not_give_now_is_not_done_again(tmp_path):
    Record.write_config(tmp_path, config()).write_trial(trial())
    file = tmp_path / "trials" / f"{trial().name}.json"
    file.rename(tmp_path / "kept")
    file.symlink_to("/proc/self/mem")
    with pytest.raises(DiskError, match="cannot be read \\(Input/output error"):
        Record.read(tmp_path)


def test_a_finished_run_is_never_replaced(tmp_path):
    record = Record.write_config(tmp_path, config()).write_trial(trial())
    with pytest.raises(AddendaError, match="never replaced"):
        record.write_trial(trial())


def test_another_comparison_in_the_same_place_is_refused(tmp_path):
    Record.write_config(tmp_path, config()).write_trial(trial())
    other = config(seeds=[0, 1, 2], budget={"kind": "steps", "value": 80, "steps": 80, "batch": 16})
    with pytest.raises(AddendaError) as error:
        Record.write_config(tmp_path, other)
    for expected in ("budget.steps (40 there, 80 now)", "seeds ([0, 1] there, [0, 1, 2] now)", "another --out"):
        assert expected in str(error.value)
    assert "title" not in str(error.value)


def test_the_same_comparison_goes_on(tmp_path):
    first = Record.write_config(tmp_path, config()).write_trial(trial())
    again = Record.write_config(tmp_path, config(title="Renamed", created="later", command="other", seeds=(0, 1)))
    assert again.config == first.config
    assert len(again.trials) == 1
    moved = Record.write_config(tmp_path, config(hardware={"cpu": "y"}))
    assert "other hardware" in Record.read(tmp_path).config.notes[0] == moved.config.notes[0]


def test_files_are_strict_json(tmp_path):
    losses = ((1, math.nan), (2, math.inf), (3, 1.5))
    record = Record.write_config(tmp_path, config()).write_trial(trial(status="diverged", test=None, losses=losses))
    text = (tmp_path / "trials" / f"{record.trials[0].name}.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["losses"] == [[1, None], [2, None], [3, 1.5]]
    assert record.trials[0].losses == ((1, None), (2, None), (3, 1.5))


def test_names_are_safe_and_distinct():
    names = {trial_name(m, "final", 0, 1e-3, 40) for m in ("lora", "lora+", "../x", "base 8-shot", "a/b", "é")}
    assert len(names) == 6
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyz0123456789ACEF-_.%B") for n in names)
    assert not any("/" in n for n in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "finale"}, "stage: expected one of"),
        ({"method": "dora"}, "method: 'dora' is not among lora, lora\\+"),
        ({"seed": None}, "seed: expected an integer"),
        ({"test": None}, "test: missing"),
        ({"test": SplitResult(accuracy=0.5, items="01x1")}, "test.items: expected a string of 0 and 1"),
        ({"test": SplitResult(accuracy=0.9, items="0101")}, "test.accuracy: 0.9 is not the share"),
        ({"ood": SplitResult(accuracy=math.nan, items="0101")}, "ood.accuracy: expected a number, came None"),
    ],
)
def test_errors_name_file_and_field(tmp_path, change, message):
    record = Record.write_config(tmp_path, config())
    with pytest.raises(AddendaError, match=message):
        record.write_trial(trial(**change))
    assert list((tmp_path / "trials").iterdir()) == []
    (tmp_path / "trials" / "x.json").write_text(json.dumps(as_json(trial(**change))))
    with pytest.raises(AddendaError, match="trials/x.json: " + message):
        Record.read(tmp_path)


def test_all_runs_answer_the_same_items_once(tmp_path):
    record = Record.write_config(tmp_path, config()).write_trial(trial())
    with pytest.raises(AddendaError, match="same items"):
        record.write_trial(trial(seed=1, test=replace(HALF, items="01")))
    with pytest.raises(AddendaError, match="two final runs"):
        record.write_trial(trial(rate=3e-3))


def test_what_is_no_record_says_so(tmp_path):
    with pytest.raises(AddendaError, match=r"config\.json was expected"):
        Record.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AddendaError, match="not JSON"):
        Record.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(as_json(config()) | {"seeds": 3}))
    with pytest.raises(AddendaError, match="seeds: expected list, came 3"):
        Record.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(as_json(config()) | {"schema": 9}))
    with pytest.raises(AddendaError, match="schema: expected 1, came 9"):
        Record.read(tmp_path)


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(AddendaError, match="The disk is full"):
        Record.write_config(tmp_path / "run", config())
    assert not list(tmp_path.iterdir())
