"""`addenda compare` without a model: the demo's plan stands for what is not given, and for nothing else."""

import pytest
import torch

from addenda.cli.main import run
from addenda.comparing import embedded
from addenda.core.base.errors import AddendaError


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `compare` is called with, by the options of the command line; it ends there."""
    monkeypatch.chdir(tmp_path)

    def asked(*options):
        got = {}

        def compare(model, data, methods, **more):
            got.update(more, model=model, data=data, methods=methods)
            raise AddendaError("that is enough")

        monkeypatch.setattr("addenda.comparing.run.compare", compare)
        with pytest.raises(SystemExit):
            run(["compare", *options])
        return got

    return asked


def test_without_a_model_the_plan_is_the_demos(asked):
    got, plan = asked(), embedded.PLAN
    assert (got["model"], got["data"], got["methods"]) == (None, None, plan["methods"].split(","))
    assert got["items"] is None and got["around"] == embedded.MIDDLES and got["validation"] == embedded.VALIDATION
    assert all(got[k] == plan[k] for k in ("budget", "search_steps", "batch", "seeds", "rates", "dtype", "grouped"))


def test_what_is_given_stays_be_it_a_default(asked):
    got = asked("--budget", "steps=40", "--batch", "8", "--items", "500", "--methods", "svft,lora", "--seeds", "2")
    assert (got["budget"], got["batch"], got["items"], got["seeds"]) == ("steps=40", 8, 500, 2)
    assert got["methods"] == ["svft", "lora"] and got["around"] == {"lora": embedded.MIDDLES["lora"]}
    assert got["search_steps"] is None  # of another budget
    assert asked("--until", "decided")["seeds"] is None


def test_other_data_keeps_the_common_defaults(asked):
    got = asked("--data", "sort-numbers")
    assert (got["budget"], got["seeds"], got["items"], got["dtype"]) == ("steps=40", None, 500, "auto")
    assert "around" not in got and "validation" not in got
    assert not asked("--model", "a/model")  # refused before: no data


@pytest.mark.parametrize(("options", "at_once"), [
    ([], 3), (["--model", "splade-tiny", "--data", "docstrings"], 3), (["--workers", "1"], 1), (["--workers", "7"], 7),
    (["--ray", "auto"], 1), (["--grouped"], 1), (["--data", "sort-numbers"], 1),
    (["--data", "sort-numbers", "--workers", "2"], 2), (["--model", "minilm", "--data", "docstrings"], 1),
])  # fmt: skip
def test_trials_of_one_thread_each_have_one_worker_a_thread(asked, options, at_once):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert asked(*options)["workers"] == at_once and torch.get_num_threads() == 3
        assert embedded.workers_of(1) == 3 and embedded.workers_of(2) == embedded.workers_of(None) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("options", "says"), [
    (["--margin", "2"], "--margin is not read with --more"),
    (["--out", "runs/compare", "--rates", "5"], "--rates, --out are not read with --more"),
])  # fmt: skip
def test_more_refuses_what_is_given_be_it_a_default(asked, capsys, options, says):
    assert asked("--more", "record", "--seeds", "5", *options) == {}
    assert says in capsys.readouterr().err


def test_an_option_that_a_comma_cut_off_is_no_method(asked, capsys):
    asked("--data", "sort-numbers", "--methods", "shira,lora:rank=2,alpha=4")
    says = capsys.readouterr().err
    assert "--methods has 'alpha=4' in the place of a method" in says and "'lora:rank=2;alpha=4,shira'" in says
    got = asked("--data", "sort-numbers", "--methods", "lora:rank=2;alpha=4,mosa@consistency=1,shira@lora-pro:trust=1")
    assert got["methods"] == ["lora:rank=2,alpha=4", "mosa@consistency=1", "shira@lora-pro:trust=1"]


def test_help_shows_how_options_are_written_on_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    with pytest.raises(SystemExit):
        run(["compare", "--help"])
    assert "'lora:rank=2;alpha=4'" in capsys.readouterr().out
