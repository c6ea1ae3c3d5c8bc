"""`per_example`: every example of a batch through its own adapter, against a loop over the examples."""

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from shared import EVERY, METHODS, attach, stir, where

THREE = ["one", "two", None, "one", "two", "three"]


def loop(model, batch, names):
    out = []
    for x, name in zip(batch, names, strict=True):
        ad.switch(model, name)
        out.append(model(x[None]))
    return torch.cat(out)


@pytest.fixture
def batch():
    return torch.randint(0, 32, (6, 5))


def three(model, methods, batch, targets="linear"):
    for i, (name, method) in enumerate(zip(("one", "two", "three"), methods, strict=True)):
        stir(attach(model, method, batch, targets=targets, name=name), 0.3, seed=i)


@pytest.mark.parametrize("name", EVERY)
def test_any_method_equals_a_loop(name, tiny, batch):
    three(tiny.double(), [METHODS[name]] * 3, batch, where(name))
    want = loop(tiny, batch, THREE)
    ad.switch(tiny, "two")
    with ad.per_example(tiny, THREE):
        got = tiny(batch)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tiny(batch), loop(tiny, batch, ["two"] * 6))  # afterwards what acted before acts again


def test_ranks_sites_and_kinds_may_differ(tiny, batch):
    three(tiny.double(), [ad.LoRA(rank=2), ad.LoRA(rank=5), ad.SHiRA(density=0.3)], batch, ["linear", "embed"])
    stir(ad.attach(tiny, ad.LoRA(rank=1), targets="layers.1.up_proj", name="four"), 0.3)
    names = ["four", "one", "two", "four", "three", None]
    want = loop(tiny, batch, names)
    with ad.per_example(tiny, names):
        torch.testing.assert_close(tiny(batch), want, rtol=1e-6, atol=1e-6)


def test_gradients_equal_those_of_the_loop_and_reach_only_who_is_named(tiny, batch):
    three(tiny.double(), [ad.LoRA(rank=2)] * 3, batch)
    names = ["one", "two", None, "one", "two", "two"]
    loop(tiny, batch, names).square().sum().backward()
    want = {n: {k: p.grad for k, p in a.named_parameters()} for n, a in ad.adapters(tiny).items()}
    for a in ad.adapters(tiny).values():
        for p in a.parameters():
            p.grad = None
    with ad.per_example(tiny, names):
        tiny(batch).square().sum().backward()
    for n in ("one", "two"):
        for key, p in ad.adapters(tiny)[n].named_parameters():
            torch.testing.assert_close(p.grad, want[n][key], rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for p in ad.adapters(tiny)["three"].parameters())


def test_one_adapter_an_example(tiny):
    """As in a population of users: 32 examples, 32 adapters."""
    names = [f"user{i}" for i in range(32)]
    for i, name in enumerate(names):
        stir(ad.attach(tiny, ad.LoRA(rank=2), name=name), 0.3, seed=i)
    batch = torch.randint(0, 32, (32, 4))
    want = loop(tiny, batch, names)
    with ad.per_example(tiny, names):
        torch.testing.assert_close(tiny(batch), want, rtol=1e-5, atol=1e-6)


def test_bad_input(tiny, mixtral, batch):
    ad.attach(tiny, ad.LoRA(rank=2))
    with pytest.raises(AddendaError, match=r"No adapter is called 'math'"), ad.per_example(tiny, ["math"]):
        pass
    with ad.per_example(tiny, ["default"] * 4), pytest.raises(AddendaError, match=r"each of 4 examples.* got 6 rows"):
        tiny(batch)
    ad.merge(tiny, allow_loss=1.0)
    with pytest.raises(AddendaError, match="merged into the base"), ad.per_example(tiny, ["default"]):
        pass
    ad.attach(mixtral, ad.LoRA(rank=2), targets="*.gate_up_proj")
    with pytest.raises(AddendaError, match="is a raw parameter"), ad.per_example(mixtral, ["default"]):
        pass


@pytest.mark.parametrize("names", ["a", None, 3])
def test_one_name_is_no_list_of_names(names, tiny):
    attach(tiny, "lora", name="a")
    with pytest.raises(AddendaError, match="a list of names, one for each example"):
        ad.per_example(tiny, names)
