"""Row-wise AdamW against one torch AdamW for every unit, and DyLoRA's true frozen mode."""

import copy
import io

import pytest
import torch
from torch import nn

from addenda import attach, optim
from addenda.optim.rowwise import RowwiseAdamW


def train(model, adapter, made, ids, steps):
    for _ in range(steps):
        (model(ids) - 1).square().mean().backward()
        made.step()
        adapter.step()
        made.zero_grad()


def units(t, i):
    return t.A[i], t.B[:, i]


def test_dylora_asks_for_it_where_it_is_frozen(tiny):
    assert isinstance(optim.build(attach(tiny, "dylora:rank=4,frozen=true")), RowwiseAdamW)
    assert isinstance(optim.build(attach(tiny, "dylora:rank=4", name="other")), torch.optim.AdamW)


def test_only_the_drawn_rank_moves(tiny, ids):
    adapter = attach(tiny, "dylora:rank=4,frozen=true")
    made = optim.build(adapter, "auto", 1e-2, weight_decay=0.3)
    drawn = []
    for _ in range(12):
        sites = [t for _, t in adapter.sites()]
        b = int(sites[0].tensors()["active"])
        drawn.append(b)
        before = [{k: p.detach().clone() for k, p in t._parameters.items()} for t in sites]
        moments = [[{k: v.clone() for k, v in made.state[p].items()} for p in (t.A, t.B)] for t in sites]
        train(tiny, adapter, made, ids, 1)
        for t, was, (of_a, of_b) in zip(sites, before, moments, strict=True):
            for i in range(4):
                same = torch.equal(t.A[i], was["A"][i]) and torch.equal(t.B[:, i], was["B"][:, i])
                assert same == (i != b - 1)
                if i != b - 1 and of_a:
                    for key, value in of_a.items():
                        assert torch.equal(made.state[t.A][key][i], value[i])
                    for key, value in of_b.items():
                        now = made.state[t.B][key]
                        assert torch.equal(now[..., i], value[..., i])
    assert len(set(drawn)) > 2
    for t in sites:
        assert made.state[t.A]["steps"].tolist() == [drawn.count(i + 1) for i in range(4)]


def test_every_unit_is_trained_as_by_an_adamw_of_its_own(tiny, ids):
    adapter = attach(tiny, "dylora:rank=3,frozen=true", targets="up_proj")
    for _, t in adapter.sites():
        t._parameters["B"].data.normal_()
    made = optim.build(adapter, "auto", 1e-2, weight_decay=0.2)
    copies, theirs = {}, {}
    for path, t in adapter.sites():
        for i in range(3):
            copies[path, i] = [nn.Parameter(u.detach().clone()) for u in units(t, i)]
            theirs[path, i] = torch.optim.AdamW(copies[path, i], lr=1e-2, weight_decay=0.2)
    for _ in range(10):
        (tiny(ids) - 1).square().mean().backward()
        for path, t in adapter.sites():
            i = int(t.tensors()["active"]) - 1
            for own, g in zip(copies[path, i], (t.A.grad[i], t.B.grad[:, i]), strict=True):
                own.grad = g.clone()
            theirs[path, i].step()
        made.step()
        adapter.step()
        made.zero_grad()
    for path, t in adapter.sites():
        for i in range(3):
            for own, other in zip(units(t, i), copies[path, i], strict=True):
                torch.testing.assert_close(own.detach(), other.detach(), rtol=1e-4, atol=1e-6)


def test_where_all_have_gradients_it_is_adamw(tiny, ids):
    found = []
    for name, model in (("adamw", copy.deepcopy(tiny)), ("rowwise-adamw", copy.deepcopy(tiny))):
        adapter = attach(model, "lora:rank=2", also_train=["score"])
        train(model, adapter, optim.build(adapter, name, 1e-2, 0.1), ids, 5)
        found.append(adapter.state_dict())
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(tiny, ids):
    def start(model):
        adapter = attach(model, "dylora:rank=4,frozen=true", also_train=["score"])
        return adapter, optim.build(adapter, "auto", 1e-2, 0.1)

    other = copy.deepcopy(tiny)
    adapter, made = start(tiny)
    train(tiny, adapter, made, ids, 4)
    file = io.BytesIO()
    torch.save([made.state_dict(), adapter.state_dict()], file)
    train(tiny, adapter, made, ids, 4)
    again, resumed = start(other)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    again.load_state_dict(values)
    again.draw(4)
    train(other, again, resumed, ids, 4)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in adapter.state_dict().items())


@pytest.mark.parametrize("gone", ["A", "B"])
def test_a_frozen_factor_stays(tiny, ids, gone):
    adapter = attach(tiny, "lora:rank=2")
    for _, t in adapter.sites():
        t._parameters["B"].data.normal_()
        t._parameters[gone].requires_grad_(False)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    train(tiny, adapter, optim.build(adapter, "rowwise-adamw", 1e-2, 0.1), ids, 2)
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, before[key]) == key.endswith(f"/{gone}")
