"""Whose a path is: an adapter's or the base's."""

import pytest

import addenda as ad
from addenda.core.modules.ours import is_ours


@pytest.mark.parametrize(
    "path", ["addenda", "addenda.default", "head.addenda", "layers.0.q_proj.addenda.default.weight.A"]
)
def test_ours(path):
    assert is_ours(path)


@pytest.mark.parametrize(
    "path", ["", "weight", "layers.0.q_proj.weight", "addenda_head.weight", "my.addendas", "my-addenda", "_addenda.x"]
)
def test_the_bases(path):
    assert not is_ours(path)


def test_the_parameters_of_an_adapter_are_the_ones_that_are_ours(tiny):
    base = {n for n, _ in tiny.named_parameters()}
    adapter = ad.attach(tiny, "lora:rank=2", targets="linear")
    every = {n for n, _ in tiny.named_parameters()}
    assert {n for n in every if not is_ours(n)} == base
    assert len(every - base) == len(adapter.parameters())
