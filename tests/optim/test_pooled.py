"""AdamW with a rate for pooled tensors, against AdamW, and against Adam's first step."""

import copy

import pytest
import torch

from addenda import AddendaError, attach, optim

SPEC = "vb-lora:rank=2,vectors=6,length=4"


def step(model, adapter, made, ids):
    (model(ids) - 1).square().mean().backward()
    made.step()
    adapter.step()
    made.zero_grad()


def test_ratio_one_is_adamw_bit_for_bit(tiny, ids):
    found = []
    for name, model in (("adamw", copy.deepcopy(tiny)), ("pooled-adamw:ratio=1", copy.deepcopy(tiny))):
        adapter = attach(model, SPEC, also_train=["score"])
        made = optim.build(adapter, name, 1e-2, 0.1)
        for _ in range(3):
            step(model, adapter, made, ids)
        found.append(adapter.state_dict())
    assert all(torch.equal(t, found[1][k]) for k, t in found[0].items())


def test_the_bank_moves_a_tenth_as_far_and_is_one_parameter(tiny, ids):
    adapter = attach(tiny, SPEC, also_train=["score"])
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    made = optim.build(adapter, "auto", 1e-3)
    assert [len(g["params"]) for g in made.param_groups] == [len(adapter.parameters()) - 1, 1]
    step(tiny, adapter, made, ids)
    for n, p in adapter.named_parameters():  # Adam's first step is the rate, wherever there is a gradient
        moved = (p.detach() - before[n]).abs()
        assert float(moved.max()) == pytest.approx(1e-4 if n == ".0/bank" else 1e-3, rel=0.1), n


def test_what_it_cannot_train_is_refused(tiny):
    with pytest.raises(AddendaError, match="ratio above 0, got 0"):
        optim.build(attach(tiny, SPEC), "pooled-adamw:ratio=0")
    with pytest.raises(AddendaError, match=r"'other' \(lora\) trains none\. Take 'adamw'"):
        optim.build(attach(tiny, "lora:rank=2", name="other"), "pooled-adamw")
