"""What a public function says of arguments of another kind than its annotations, before it does anything."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError
from addenda.core.base.arguments import checked


@checked()
def called(
    model: nn.Module | None = None,
    *,
    batch: int = 1,
    share: float | None = None,
    on: bool = False,
    word: str = "a",
    label: str | None = None,
    how: Literal["a", "b"] = "a",
    tell: Callable[[int], None] | None = None,
    tokens: Iterable[Any] = (),
    texts: Sequence[str] = (),
    columns: dict | None = None,
    weights: Mapping[str, float] | None = None,
    path: str | Path = "a",
    targets: Iterable[str | Callable] = (),
    names: str | Iterable[str] | None = None,
    anything: Any = None,
) -> str:
    return "called"


WRONG = {
    "model": [("folder", "a torch.nn.Module or None, got 'folder'"), (nn.Linear, "got a Linear")],
    "batch": [(None, "a whole number, got None"), (True, "got True"), ([1], "got a list"), (torch.ones(2), "a Tensor")],
    "share": [([0.5], "a number or None, got a list")],
    "on": [("no", "True or False, got 'no'"), (1, "got 1"), (None, "got None"), (torch.ones(2), "got a Tensor")],
    "word": [([], "a text, got a list")],
    "label": [(3, "a text or None, got 3")],
    "how": [({}, "a text, got a dict")],
    "tell": [(3, "a function or None, got 3")],
    "tokens": [(None, "a list, got None")],
    "texts": [(3, "a list, got 3")],
    "columns": [(["a"], "a dict or None, got a list")],
    "names": [(3, "a text or a list or None, got 3")],
    "weights": [(0.5, "a dict or None, got 0.5"), (["a"], "got a list")],
}
FITS = {
    "model": [None, nn.Linear(1, 1)], "batch": [2, np.int64(2)], "share": [None, 1, np.float32(0.5)], "on": [True],
    "word": ["b", 3], "label": [None, "b"], "how": ["c", 3], "tell": [None, print], "tokens": [(), "abc", {1}],
    "texts": ["abc", ["a"]], "columns": [None, {}], "weights": [{}, {"a": 1}], "path": [3, None], "targets": [None, 3],
    "names": [None, "a", ["a"]],
    "anything": [None, [], 3],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "said"), [(n, *case) for n, cases in WRONG.items() for case in cases])
def test_a_value_of_another_kind_is_named_with_what_was_expected(name, value, said):
    with pytest.raises(AddendaError, match=rf"called cannot be called so: {name} must be .*{said}"):
        called(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, value) for n, values in FITS.items() for value in values])
def test_what_fits_and_what_its_function_judges_better_passes(name, value):
    assert called(**{name: value}) == "called"


def test_what_is_wrong_comes_together_and_once():
    with pytest.raises(AddendaError, match="batch must be a whole number, got 'x'; on must be True or False") as told:
        called(batch="x", on="x")
    assert str(told.value).count("batch") == 1


def test_an_adapter_in_the_place_of_its_model_is_told_of_it(tiny):
    adapter = ad.attach(tiny, "lora", targets="q_proj")
    calls = (ad.detach, ad.merge, ad.unmerge, ad.status, ad.adapters, ad.disabled, ad.lean, ad.unlean, ad.shrink)
    for call in (*calls, ad.dequantize, ad.adopt, ad.release, lambda model: ad.switch(model, None)):
        with pytest.raises(
            AddendaError, match=r"Expected a torch\.nn\.Module as the model, got Adapter. Its \.model is one"
        ):
            call(adapter)
    assert "default" in ad.adapters(tiny)


def test_a_value_of_another_kind_leaves_the_model_as_it_was(tiny):
    flags = [(n, p.requires_grad) for n, p in tiny.named_parameters()]
    for options in ({"seed": None}, {"freeze": "no"}, {"progress": 3}, {"head_bits": [1]}):
        with pytest.raises(AddendaError, match=f"attach cannot be called so: {next(iter(options))} must be"):
            ad.attach(tiny, "lora", targets="q_proj", **options)
    assert [(n, p.requires_grad) for n, p in tiny.named_parameters()] == flags
