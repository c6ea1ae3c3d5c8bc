"""LoRA+ against AdamW, and against Adam's formula with two rates."""

import copy

import pytest
import torch

from addenda import AddendaError, attach, optim


def train(model, adapter, made, ids, steps=4):
    for _ in range(steps):
        (model(ids) - 1).square().mean().backward()
        made.step()
        adapter.step()
        made.zero_grad()


@pytest.mark.parametrize("spec", ["lora:rank=2", "pissa:rank=2"])
def test_ratio_one_is_adamw_bit_for_bit(tiny, ids, spec):
    found = []
    for name, model in (("adamw", copy.deepcopy(tiny)), ("lora+:ratio=1", copy.deepcopy(tiny))):
        adapter = attach(model, spec, also_train=["score"])
        train(model, adapter, optim.build(adapter, name, 1e-2, 0.1), ids)
        found.append(adapter.state_dict())
    assert all(torch.equal(t, found[1][k]) for k, t in found[0].items())


def test_b_moves_ratio_times_as_far_and_a_schedule_keeps_the_ratio(tiny, ids):
    adapter = attach(tiny, "lora:rank=2", targets="up_proj", also_train=["score"])
    with torch.no_grad():
        for _, t in adapter.sites():
            if "B" in t._parameters:
                t.B.normal_()
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    made = optim.build(adapter, "lora+", 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
    train(tiny, adapter, made, ids, 1)
    for n, p in adapter.named_parameters():  # Adam's first step is the rate, whatever the gradient
        rate = 0.5e-3 * (16 if n.endswith("/B") else 1)
        torch.testing.assert_close((p.detach() - before[n]).abs(), torch.full_like(p, rate), rtol=0.02, atol=0)
    assert schedule.get_last_lr() == [0.5e-3, 8e-3]


def test_what_it_cannot_train_is_refused(tiny):
    with pytest.raises(AddendaError, match="ratio above 0, got 0"):
        optim.build(attach(tiny, "lora:rank=2"), "lora+:ratio=0")
    with pytest.raises(AddendaError, match="no site of adapter"):
        optim.build(attach(tiny, "shira:density=0.1", name="other"), "lora+")
