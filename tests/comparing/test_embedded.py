"""The embedded tasks: which one a model and data mean, and a plan that is the same everywhere."""

import pytest

from addenda.comparing import embedded
from addenda.comparing.arm import parse_arm
from addenda.comparing.budget import Budget
from addenda.comparing.embedded import DOCSTRINGS, PLAN, middles, subject_of, task_of, threads_of
from addenda.core.base.errors import AddendaError


@pytest.mark.parametrize(
    ("model", "data", "task"),
    [
        (None, None, "docstrings"), (None, "docstrings", "docstrings"), ("minilm", "docstrings", "docstrings"),
        (None, "sort-numbers", "sort-numbers"), ("a/model", "sums.jsonl", None), ("minilm", "sums.jsonl", None),
    ],
)  # fmt: skip
def test_names_that_mean_an_embedded_task(model, data, task):
    assert task_of(model, data) == task


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        ("a/model", None, "Give model= and data= together"), (None, "sums.jsonl", "Give model= and data= together"),
        ("a/model", "docstrings", "takes splade-tiny or minilm or e5; got model='a/model'"),
        ("minilm", "sort-numbers", "takes no model: it has its own; got model='minilm'"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_said(model, data, told):
    with pytest.raises(AddendaError, match=told):
        task_of(model, data)


def test_a_folder_of_that_name_is_ones_own(tmp_path, monkeypatch):
    (tmp_path / "docstrings").mkdir()
    monkeypatch.chdir(tmp_path)
    assert task_of("a/model", "docstrings") is None
    assert task_of(None, "docstrings") == "docstrings"  # as where the record itself is to be called so


def test_the_encoder_is_not_quantised():
    with pytest.raises(AddendaError, match="leave quantize= out"):
        subject_of(DOCSTRINGS, None, print, quantize="nf4")


def test_the_plan_follows_no_clock_and_has_what_a_decision_needs():
    methods = PLAN["methods"].split(",")
    assert Budget.parse(PLAN["budget"]).kind == "steps" and "within" not in PLAN
    assert len(methods) >= 4 and PLAN["rates"] >= 3 and PLAN["seeds"] >= 5
    assert set(middles(methods)) == {parse_arm(m).label for m in methods}
    assert middles(["lora", "svft"]) == {"lora": embedded.MIDDLES["lora"]}
    assert (threads_of(None), threads_of("splade-tiny"), threads_of("minilm")) == (1, 1, None)
