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
