import sys

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import optim
from addenda.core.base.errors import AddendaError
from addenda.optim.plain import adamw


@pytest.fixture
def adapter():
    return ad.attach(nn.Sequential(nn.Linear(64, 128, bias=False)), "full", targets="0")


def test_names_and_functions(adapter):
    label, make = optim.named("adamw", adapter)
    assert label == "adamw"
    made = make(adapter, 1e-2, 0.5)
    assert made.defaults["lr"] == 1e-2
    assert made.defaults["weight_decay"] == 0.5
    assert optim.named(adamw, adapter) == ("adamw", adamw)
    assert optim.named("auto", adapter)[0] == "adamw"
    with pytest.raises(AddendaError, match=r"got 'adamw8bit'\. Did you mean 'adamw-8bit'"):
        optim.named("adamw8bit", adapter)
    with pytest.raises(AddendaError, match=r"adamw has no option 'beta'.* Its options: none\."):
        optim.named("adamw:beta=1", adapter)
    with pytest.raises(AddendaError, match=r"the model is on the CPU\. Take 'adamw-8bit'"):
        optim.build(adapter, "paged-adamw-8bit")


def test_every_optimizer_says_what_it_is():
    for name, info in optim.known().items():
        assert info.about.endswith("."), name
        assert info.paper, name


def test_without_bitsandbytes(monkeypatch, adapter):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AddendaError, match=r"pip install 'addenda\[bitsandbytes\]'"):
        optim.build(adapter, "adamw-8bit")


@pytest.mark.filterwarnings("ignore")
def test_moments_in_eight_bits(adapter):
    pytest.importorskip("bitsandbytes")
    made = optim.build(adapter, "adamw-8bit", 1e-2)
    (p,) = adapter.parameters()
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    made.step()
    assert made.state[p]["state1"].dtype == torch.uint8
    torch.testing.assert_close(before - p, torch.full_like(p, 1e-2), rtol=1e-3, atol=0)


def test_options_of_the_wrong_kind_are_refused(adapter):
    for spec, says in {
        "lora+:ratio=much": r"lora\+: ratio must be float, got 'much'",
        "lora-pro:mode=best": r"lora-pro: mode must be one of 'full', 'efficient', 'sgd', got 'best'",
        "lora-pro:mode": r"Expected option=value in 'lora-pro:mode', got 'mode'",
    }.items():
        with pytest.raises(AddendaError, match=says):
            optim.named(spec, adapter)


@pytest.mark.parametrize("name", [*optim.known(), "auto"])
def test_an_adapter_that_may_not_train_is_refused(name):
    adapter = ad.attach(nn.Sequential(nn.Linear(8, 8)), "lora:rank=2", targets="0")
    adapter.requires_grad_(False)
    with pytest.raises(
        AddendaError, match=r"'default' may train.*requires_grad_\(\) first, or load it with trainable=True"
    ):
        optim.build(adapter, name)


def test_lora_fa_is_refused_where_no_left_factor_trains_and_freezes_nothing(adapter):
    adapter = ad.attach(nn.Sequential(nn.Linear(8, 8)), "lora:rank=2", targets="0")
    adapter.sites().__next__()[1].B.requires_grad_(False)
    with pytest.raises(
        AddendaError, match=r"left factors of adapter 'default', and requires_grad of all of them is off"
    ):
        optim.build(adapter, "lora-fa")
    assert [p.requires_grad for p in adapter.parameters()] == [True, False]


@pytest.mark.parametrize(("options", "says"), [
    ({"rate": -1.0}, "rate must be at least 0"),
    ({"rate": float("nan")}, "rate must be at least 0"), ({"rate": "1e-3"}, "rate must be a number"),
    ({"weight_decay": -0.1}, "weight_decay must be"), ({"steps": 0}, "steps must be at least 1"),
])  # fmt: skip
def test_numbers_out_of_their_range_are_refused(options, says, adapter):
    with pytest.raises(AddendaError, match=f"build cannot be called so: {says}"):
        optim.build(adapter, "adamw", **options)
