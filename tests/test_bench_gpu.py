"""`python -m bench gpu`: its parts, their limits, and that one which fails takes no other with it. Nothing is timed."""

import inspect
import json
import sys
from pathlib import Path

import bench.__main__ as command
import pytest
from bench import gpu

HERE = Path(__file__)
ROOT = HERE.parents[1]


def test_the_parts_fit_into_eight_minutes():
    assert list(gpu.PARTS) == ["contracts", "steps", "memory", "tune"]
    assert sum(part.limit for part in gpu.PARTS.values()) <= 8 * 60 - 30
    for part in gpu.PARTS.values():
        assert inspect.isgeneratorfunction(part.rows)
        assert list(inspect.signature(part.rows).parameters) == ["device", "quick"]


def test_the_tests_that_know_a_device_are_all_run():
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.on_device" in p.read_text() and p != HERE]
    assert sorted(marked) == sorted(ROOT / name for name in gpu.CONTRACTS)


def test_the_page_names_the_command():
    assert "python -m bench gpu" in (ROOT / "docs" / "speed.md").read_text()


def test_the_command_keeps_one_record(monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    asked = []

    def part(name, limit, device, quick):
        asked.append((name, limit, device, quick))
        return {"seconds": 1.0, "ended": "failed: for a reason", "found": {}}

    monkeypatch.setattr(gpu, "_in_process", part)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    command.main()
    assert asked == [(name, part.limit, "cpu", True) for name, part in gpu.PARTS.items()]
    (record,) = tmp_path.iterdir()
    kept = json.loads(record.read_text())
    assert record.name == "gpu.json"
    assert {"command", "versions", "hardware", "found"} <= kept.keys()
    assert kept["found"]["steps"]["ended"] == "failed: for a reason"
    assert "for a reason" in capsys.readouterr().out
    assert "gpu" not in command.COMMANDS, "`all` is for the machine at hand"


def test_a_part_that_fails_or_takes_long_says_so():
    failed = gpu._in_process("no such part", 120, "cpu", True)
    assert failed["ended"].startswith("failed") and "no such part" in failed["ended"]
    assert gpu._in_process("memory", 0.2, "cpu", True)["ended"] == "stopped at its limit of 0 s"


def test_what_was_measured_is_a_table():
    turns = {"floor": [{"wall": 1.0, "memory": 10}], "own": [{"wall": 1.1, "memory": 12}]}
    peer = {"peer": [{"wall": 2.2, "memory": 24}]}
    steps = {
        "about": {"model": "m"},
        "ours/lora": {"trainable": 5, "peer": "peft/lora", "turns": turns | peer},
        "full": {"trainable": 7, "peer": None, "turns": turns},
        "ours/odd": {"failed": "ValueError: odd"},
    }
    rows = {
        "contracts": {"counts": {"PASSED": 3, "FAILED": 1, "SKIPPED": 0}, "failed": ["test_start[lora]"]},
        "steps": steps,
        "memory": {"lora": {"predicted": 2**20, "measured": 2**21, "ratio": 0.5}, "full": {"failed": "out of memory"}},
        "tune": {"run": {"first_loss": 2.0, "last_loss": 1.0, "step_seconds": 0.1}, "loaded": {"equal": True}},
    }
    found = {name: {"seconds": 1.0, "ended": "finished", "found": of} for name, of in rows.items()}
    text = gpu.table({"device": {"device": "cuda"}} | found)
    assert "3 passed, 1 failed: test_start[lora]" in text
    assert "| ours/lora | 5 | 1100.0 ms | 1.10 (1.10 to 1.10) | 1.20 (1.20 to 1.20) | 0.50 (0.50 to 0.50) |" in text
    assert "ValueError: odd" in text
    assert "| lora | 1 | 2 | 0.5 |" in text
    assert "out of memory" in text
    assert "loss 2.000 to 1.000" in text
