"""Compositions as JSON: those that have a form come back, and what anybody may have written is refused."""

import json

import pytest
import torch

import addenda as ad
from addenda.compose.written import of_json, to_json
from addenda.core.base.errors import AddendaError

FORMS = (
    ad.Stack("de", "task"),
    ad.Stack("de", None, "task", skip="own"),
    ad.Stack(ad.Split("de", "fi", by="separator:2", pooled=0), "task").without("first:2"),
    ad.Split("a", "b", sizes=(3, None), pooled=1).without({"a": [0, -1], "b": "last:1"}),
    ad.Stack(ad.Average("a", "b", weights=(3, 1)), ad.Fuse("c", "d", by="f")),
    ad.Average("a", "b", weights=(3, 1), normalize=False),
    ad.Split("a", ad.Stack("b", "c"), by="types"),
)


@pytest.mark.parametrize("composition", FORMS, ids=repr)
def test_a_composition_comes_back(composition):
    text = json.dumps(to_json(composition))
    again = of_json(json.loads(text))
    assert repr(again) == repr(composition) and json.dumps(to_json(again)) == text
    assert again.names() == composition.names() and again.leave_out == composition.leave_out
    for a, b in zip(again.within(), composition.within(), strict=True):
        kept = ("weights", "sizes", "by", "pooled", "skip")
        assert [getattr(a, k, None) for k in kept] == [getattr(b, k, None) for k in kept]


def test_what_depends_on_a_batch_has_no_form():
    for composition in (
        ad.BatchSplit("a", "b", sizes=(1, 2)),
        ad.Parallel("a", "b"),
        ad.Split("a", "b", sizes=torch.tensor([1, 2])),
        ad.Stack(ad.Split("a", "b", by=lambda inputs: inputs["input_ids"]), "c"),
    ):
        with pytest.raises(AddendaError, match="which no file can hold"):
            to_json(composition)


BAD = {
    "a name": ("task", "an object of JSON"),
    "a list": (["task"], "an object of JSON"),
    "nothing": ({}, "is one of stack, average, fuse, split"),
    "two": ({"stack": ["a"], "split": ["a"]}, "is one of"),
    "another": ({"stak": ["a"]}, "is one of"),
    "an option": ({"stack": ["a"], "code": "x"}, "'stack' has no 'code'"),
    "of another": ({"stack": ["a"], "weights": [1]}, "'stack' has no 'weights'"),
    "empty": ({"stack": []}, "a list of 1 to 64"),
    "many": ({"stack": ["a"] * 65}, "a list of 1 to 64"),
    "no list": ({"stack": "a"}, "a list of 1 to 64"),
    "a number": ({"stack": [3]}, "a name, null or a composition, got 3"),
    "in a list": ({"stack": [["a"]]}, "a name, null or a composition"),
    "twice": ({"stack": ["a", "b", "a"]}, "through 'a' twice"),
    "skip": ({"stack": ["a"], "skip": "all"}, "'last' or 'own', got 'all'"),
    "no skip": ({"stack": ["a"], "skip": None}, "skip of 'stack' is a text"),
    "weights": ({"average": ["a", "b"], "weights": "1,2"}, "a list of numbers"),
    "infinite": ({"average": ["a"], "weights": [float("inf")]}, "as many finite weights"),
    "true": ({"average": ["a"], "weights": [True]}, "a list of numbers"),
    "no weight": ({"average": ["a", "b"], "weights": [None, 1]}, "a list of numbers"),
    "a weight of 400 digits": ({"average": ["a", "b"], "weights": [10**400, 1]}, "a list of numbers"),
    "by a token of 20 digits": ({"split": ["a", "b"], "by": "separator:" + "9" * 20}, "'separator:102' with the id"),
    "no fusion": ({"fuse": ["a"]}, "by which adapter"),
    "sizes": ({"split": ["a", "b"], "sizes": [1, 2, 3]}, "wants as many sizes"),
    "half a size": ({"split": ["a", "b"], "sizes": [0.5, None]}, "wants as many sizes"),
    "untold": ({"split": ["a", "b"]}, "give sizes=, or by="),
    "by": ({"split": ["a", "b"], "by": "os.system"}, "'separator:102' with the id"),
    "by much": ({"split": ["a", "b"], "by": ["a"]}, "by of 'split' is a text"),
    "long": ({"stack": ["a"], "skip": "x" * 999}, "skip of 'stack' is a text"),
    "long layers": ({"stack": ["a"], "leave_out": "x" * 999}, "leave_out of a composition is layers"),
    "layers of a long name": ({"stack": ["a"], "leave_out": {"x" * 999: [0]}}, "leave_out of a composition is layers"),
    "pooled": ({"split": ["a", "b"], "by": "types", "pooled": 2}, "the number of a part"),
    "layers": ({"stack": ["a"], "leave_out": 3}, "leave_out of a composition is layers"),
    "no layers": ({"stack": ["a"], "leave_out": []}, "leave_out of a composition is layers"),
    "layers of none": ({"stack": ["a"], "leave_out": {"a": []}}, "leave_out of a composition is layers"),
    "layers inside": ({"stack": [{"stack": ["a"], "leave_out": [0]}]}, "'stack' has no 'leave_out'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_anybody_may_have_written_is_refused(case):
    raw, said = BAD[case]
    with pytest.raises(AddendaError, match=said):
        of_json(raw)


def test_a_deep_one_is_refused():
    raw: dict = {"stack": ["a"]}
    for _ in range(12):
        raw = {"stack": [raw]}
    with pytest.raises(AddendaError, match="at most 8 in each other"):
        of_json(raw)
