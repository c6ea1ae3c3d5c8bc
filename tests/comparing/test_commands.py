"""Commands of a record: they parse, train as the arm was trained, and carry nothing that a record has no say in."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from tests.comparing.test_choose import a_record

from addenda.cli.main import app
from addenda.comparing.choose import choose
from addenda.comparing.commands import more_command, tune_command
from addenda.comparing.entries import DataRecord, ModelRecord
from addenda.comparing.record import Record
from addenda.core.method.catalogue import build
from addenda.data.task import NAME as TASK
from addenda.models.embedded import NAME as MODEL

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TUNE, COMPARE = COMMANDS["tune"], COMMANDS["compare"]
COST = (0.5, (1, 1, 1))


def parsed(command):
    """The values that the command line's own parser finds in an `addenda tune` command."""
    words = shlex.split(command)
    assert words[:2] == ["addenda", "tune"]
    return TUNE.make_context("tune", words[2:]).params


@pytest.mark.parametrize(("arm", "about", "method", "expected"), [
    ("lora", {}, build("lora"), {}),
    ("lora:rank=4", {"options": {"rank": 4}}, build("lora:rank=4"), {}),
    ("lora:rank=4", {"options": {"rank": 3}}, build("lora:rank=3"), {}),  # of a budget of parameters
    ("lora:alpha=2.5,rank=4", {"options": {"rank": 4, "alpha": 2.5}}, build("lora:rank=4,alpha=2.5"), {}),
    ("lora@lora-pro:mode=full", {"options": {"optimizer": "lora-pro:mode=full"}}, build("lora"),
     {"optimizer": "lora-pro:mode=full"}),
    ("mosa@adamw@consistency=1,consistency_add=0.5",
     {"options": {"optimizer": "adamw", "consistency": 1.0, "consistency_add": 0.5}}, build("mosa"),
     {"optimizer": "adamw", "consistency": 1.0, "consistency_add": 0.5}),
    ("lora", {"targets": ["q_proj", "v_proj"]}, build("lora"), {"targets": "q_proj,v_proj"}),
    ("lora", {"targets": "linear"}, build("lora"), {"targets": None}),
    ("svft:pattern=banded,band=3", {"options": {"pattern": "banded", "band": 3}}, build("svft:pattern=banded,band=3"),
     {}),
])  # fmt: skip
def test_it_parses_and_trains_as_the_arm_was(tmp_path, arm, about, method, expected):
    record = a_record(tmp_path, {arm: COST}, **{arm: about})
    command = choose(record).command
    assert command is not None
    values = parsed(command)
    assert build(values["method"]) == method
    assert (values["rate"], values["steps"], values["batch"]) == (0.003, 10, 4)
    assert {k: values[k] for k in expected} == expected


NAMED, UNNAMED = {"model": "MODEL", "data": "DATA"}, {"model": None, "data": None}


@pytest.mark.parametrize(("command", "about", "expected"), [
    ("addenda compare --data sort-numbers --seeds 2", (MODEL, TASK), UNNAMED),
    ("", (MODEL, TASK), UNNAMED),
    ("addenda compare", ("splade-tiny", "docstrings-library"), NAMED),
    ("addenda compare -m minilm -d docstrings --max-length 64", ("minilm", "docstrings-library"),
     NAMED | {"max_length": 64}),
    ("addenda compare -m dinov2 --data 'my sums' --subset=8/class --skip-corrupt --out x", ("tiny", "sums"),
     {"model": "dinov2", "data": "my sums", "subset": "8/class", "skip_corrupt": True}),
    ("addenda compare --data sums.csv --trust-remote-code", ("tiny", "sums"), {"model": "MODEL", "data": "sums.csv"}),
    ("addenda --debug compare -m m -d d", ("tiny", "sums"), {"model": "m", "data": "d"}),
    ("addenda --debug", ("tiny", "sums"), NAMED),
    ("addenda compare --config run.yaml --data d", ("tiny", "sums"), NAMED),
    ("", ("tiny", "sums"), NAMED),
    ("python -m recipes.svft --model x", ("tiny", "sums"), NAMED),
    ("addenda compare --model '$(touch x)' --data ';rm -r x'", ("tiny", "sums"),
     {"model": "$(touch x)", "data": ";rm -r x"}),
    ("addenda compare --model --trust-remote-code --data '\x1b[2J'", ("tiny", "sums"), NAMED),
    ("addenda compare 'unclosed", ("tiny", "sums"), NAMED),
])  # fmt: skip
def test_model_and_data_are_those_that_the_record_knows(tmp_path, command, about, expected):
    record = a_record(tmp_path, {"lora": COST}, command=command)
    config = replace(record.config, model=ModelRecord(name=about[0]), data=DataRecord(name=about[1]))
    values = parsed(tune_command(replace(record, config=config), "lora"))
    assert {k: values[k] and (str(values[k]) if k in ("model", "data") else values[k]) for k in expected} == expected
    assert values["trust_remote_code"] is False


@pytest.mark.parametrize(("arm", "about"), [
    ("of a recipe", {}), ("lora", {"options": {"rank": "8; rm"}}), ("lora", {"options": {"rank": [1]}}),
    ("lora", {"options": {"nothing": 1}}), ("lora@adam", {}), ("lora", {"options": {"rank": None}}),
    ("atoms\n", {}), ("lora:rank=2\u202e", {"options": {"rank": 2}}),
])  # fmt: skip
def test_what_tune_cannot_train_has_no_command(tmp_path, arm, about):
    record = a_record(tmp_path, {arm: COST}, **{arm: about})
    choice = choose(record)
    assert choice.arm == arm and choice.command is None


def test_numbers_that_tune_refuses_give_no_command(tmp_path):
    record = a_record(tmp_path, {"lora": COST})
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"batch": 4', '"batch": 0'))
    assert tune_command(Record.read(tmp_path), "lora") is None
    assert tune_command(record, "nobody") is None


@pytest.mark.parametrize(("of", "command", "expected"), [
    ("embedded", "", ""), ("files", "addenda compare -m m -d d", ""), ("files", "", " --model MODEL --data DATA"),
])  # fmt: skip
def test_more_seeds_of_a_record_that_is_here(tmp_path, monkeypatch, of, command, expected):
    monkeypatch.chdir(tmp_path)
    record = a_record(Path("runs/my compare"), {"lora": COST}, of=of, command=command)
    assert more_command(record, 8) == f"addenda compare --more 'runs/my compare' --seeds 8{expected}"
    there = more_command(Record.read(tmp_path / "runs/my compare"), 8)
    assert there == f"addenda compare --more RECORD --seeds 8{expected}", "a page is handed on without its path"
    words = shlex.split(str(there))[2:]
    assert COMPARE.make_context("compare", words).params["seeds"] == 8


def test_what_cannot_grow_has_no_command(tmp_path):
    assert more_command(a_record(tmp_path / "a", {"lora": COST}, of="a subject"), 8) is None
    older = a_record(tmp_path / "b", {"lora": COST})
    assert more_command(replace(older, config=replace(older.config, identity=None)), 8) is None
    assert more_command(replace(older, config=replace(older.config, options=None)), 8) is None
