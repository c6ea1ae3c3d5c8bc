"""LoRA-FA: A keeps its bits, B is trained as AdamW does, and layers keep no input."""

import copy

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach, optim


def test_b_alone_is_trained(tiny, ids):
    other = copy.deepcopy(tiny)
    adapter, control = attach(tiny, "lora:rank=2"), attach(other, "lora:rank=2")
    lefts = [t.B for _, t in control.sites()]
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    made = optim.build(adapter, "lora-fa", 1e-2, 0.1)
    theirs = torch.optim.AdamW(lefts, 1e-2, weight_decay=0.1, fused=True)
    for _ in range(4):
        for model, its, how in ((tiny, adapter, made), (other, control, theirs)):
            (model(ids) - 1).square().mean().backward()
            how.step()
            its.step()
            model.zero_grad()
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, before[key]) == key.endswith("/A"), key
        assert torch.equal(tensor, control.state_dict()[key]), key
    assert all(t.A.grad is None for _, t in adapter.sites())
    adapter.requires_grad_()
    assert all(t.A.requires_grad for _, t in adapter.sites())


@pytest.mark.parametrize("spec", ["lora:rank=2", "pissa:rank=2"])
def test_no_input_is_kept(spec):
    model = nn.Sequential(nn.Linear(64, 48))
    adapter, x = attach(model, spec, targets="0"), torch.randn(5, 64)

    def kept() -> bool:
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
            model(x)
        return x.data_ptr() in held

    assert kept()
    optim.build(adapter, "lora-fa", 1e-2)
    assert not kept()


def test_what_has_no_factors_is_refused(tiny):
    with pytest.raises(AddendaError, match="'lora-fa' trains the two thin factors"):
        optim.build(attach(tiny, "shira:density=0.1"), "lora-fa")
