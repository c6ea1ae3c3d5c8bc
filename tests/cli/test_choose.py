"""`addenda choose`: the same as in Python, as words or as JSON."""

import json

import pytest
from tests.comparing.test_choose import a_record

from addenda.comparing.choose import choose
from shared import call


@pytest.fixture
def record(tmp_path):
    arms = {"lora": (0.50, (300, 30, 3)), "shira": (0.495, (100, 40, 2))}
    return a_record(tmp_path / "run", arms, command="addenda compare --model m --data d")


def test_it_says_the_arm_why_and_the_command(record, capsys):
    call("choose", record.path)
    assert capsys.readouterr().out.splitlines() == [
        "SHIRA: memory 100 B", choose(record).why,
        "addenda tune --out runs/shira --model m --data d --method shira --rate 0.003 --steps 10 --batch 4",
    ]  # fmt: skip
    call("choose", record.path, "--cost", "size")
    assert capsys.readouterr().out.startswith("LORA: size 30 B")


def test_json_is_what_python_gives(record, capsys):
    call("choose", record.path, "--cost", "time", "--json")
    assert json.loads(capsys.readouterr().out) == choose(record, "time").as_json()


def test_what_it_refuses(record, tmp_path, capsys):
    call("choose", record.path, "--cost", "money", code=2)
    assert "--cost" in capsys.readouterr().err
    call("choose", tmp_path / "nowhere", code=2)
    assert "No record at" in capsys.readouterr().err
