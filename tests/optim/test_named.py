import sys

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.errors import AddendaError
from addenda.train.optimizers import adamw, named

CPU = torch.device("cpu")


def test_names_and_functions():
    assert named("adamw", CPU) == ("adamw", adamw)
    assert named(adamw, CPU) == ("adamw", adamw)
    with pytest.raises(AddendaError, match=r"got 'adamw8bit'\. Did you mean 'adamw-8bit'"):
        named("adamw8bit", CPU)
    with pytest.raises(AddendaError, match=r"the model is on the CPU\. Take 'adamw-8bit'"):
        named("paged-adamw-8bit", CPU)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AddendaError, match=r"pip install 'addenda\[bitsandbytes\]'"):
        named("adamw-8bit", CPU)


@pytest.mark.filterwarnings("ignore")
def test_moments_in_eight_bits():
    pytest.importorskip("bitsandbytes")
    adapter = ad.attach(nn.Sequential(nn.Linear(64, 128, bias=False)), "full", targets="0")
    made = named("adamw-8bit", CPU)[1](adapter, 1e-2, 0.0)
    (p,) = adapter.parameters()
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    made.step()
    assert made.state[p]["state1"].dtype == torch.uint8
    torch.testing.assert_close(before - p, torch.full_like(p, 1e-2), rtol=1e-3, atol=0)
