"""BitFit: the biases, all of them, and nothing else."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach, detach
from addenda.methods.bitfit import BitFit


def net():
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4, bias=False), nn.Linear(4, 3))


BIASES = {"0.bias": 12, "1.bias": 12, "3.bias": 3}


def test_every_bias_is_trained_and_nothing_else():
    model, x = net(), torch.randn(5, 8)
    before, want = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    adapter = attach(model, "bitfit")
    assert {path: t.value.numel() for path, t in adapter.sites()} == BIASES
    assert adapter.trainable == sum(BIASES.values())
    assert torch.equal(model(x), want)
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in adapter.parameters():
            assert p.grad is not None and p.grad.any()
            p.sub_(0.1 * p.grad)
    new = net()
    new.load_state_dict(before | {path: t.value.detach() for path, t in adapter.sites()})
    torch.testing.assert_close(model(x), new(x))
    detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_without_biases_is_refused():
    with pytest.raises(AddendaError, match="matches nothing"):
        attach(nn.Sequential(nn.Linear(4, 4, bias=False)), BitFit())
