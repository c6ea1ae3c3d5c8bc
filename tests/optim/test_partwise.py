"""Part-wise AdamW against one torch AdamW for every part, and what moves in a step of MoSA."""

import copy
import io

import pytest
import torch

import toys
from addenda import AddendaError, adapters, attach, optim, plan
from addenda.optim.partwise import PartwiseAdamW

NAME = "mosa-houlsby:rank=4,parts=3,share=none"


def steps(model, adapter, made, count, watch=lambda i: None):
    ids = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB
    for i in range(count):
        (model(input_ids=ids).logits - 1).square().mean().backward()
        watch(i)
        made.step()
        adapter.step()
        made.zero_grad()


def bert(spec=NAME, **options):
    model = toys.make_bert()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return model.train(), attach(model, spec, seed=1, **options)


def test_it_is_what_a_mixture_asks_for():
    model, adapter = bert()
    assert isinstance(optim.build(adapter), PartwiseAdamW)
    assert type(optim.build(attach(model, "mosa-houlsby:rank=4,parts=1", name="one"))) is torch.optim.AdamW
    with pytest.raises(AddendaError, match=r"dealt out to parts, and adapter 'plain' \(houlsby\) has none. Take 'ada"):
        optim.build(attach(model, "houlsby:rank=4", name="plain"), "partwise-adamw")


def test_only_the_drawn_part_moves_and_what_is_shared_moves_always():
    model, adapter = bert(also_train=["classifier"])
    made = optim.build(adapter, "auto", 1e-2, weight_decay=0.3)
    sites, drawn = [t for _, t in adapter.sites() if t.method.name], []
    for _ in range(9):
        now = [{k: int(t.tensors()[f"{k}_drawn"]) for k in ("down", "up")} for t in sites]
        before = [{k: p.detach().clone() for k, p in t._parameters.items()} for t in sites]
        moments = [{k: made.state[t._parameters[k]].get("exp_avg_sq", torch.zeros(1)).clone() for k in ("down", "up")}
                   for t in sites]  # fmt: skip
        head = model.classifier.addenda.default.weight.value.detach().clone()
        steps(model, adapter, made, 1)
        drawn.append(now)
        for t, was, draw, of in zip(sites, before, now, moments, strict=True):
            for k in ("down", "up"):
                elsewhere = t.method.dealt(t.tensors())[k] != draw[k]
                assert torch.equal(t._parameters[k][elsewhere], was[k][elsewhere]), "bit for bit, for all the decay"
                square = made.state[t._parameters[k]]["exp_avg_sq"]
                assert torch.equal(square[elsewhere], of[k].expand(square.shape)[elsewhere])
            assert not torch.equal(t.up[~elsewhere], was["up"][~elsewhere])
            assert not torch.equal(t.up_bias, was["up_bias"]), "shared by all modules"
        assert not torch.equal(model.classifier.addenda.default.weight.value, head)
    for i, t in enumerate(sites):
        assert made.state[t.up]["steps"].tolist() == [0, *(sum(d[i]["up"] == k for d in drawn) for k in (1, 2, 3))]


def test_plan_counts_its_moments():
    def kept(name):
        made = plan(toys.make_bert(), NAME, batch=2, length=6, optimizer=lambda a: optim.build(a, name))
        return made.step.optimizer

    assert kept("adamw") <= kept("auto") < 1.1 * kept("adamw")


def test_plain_adamw_moves_the_others_too():
    """Why it is needed: momentum, and weight decay without any gradient."""
    model, adapter = bert("mosa-houlsby:rank=4,parts=3")
    made = optim.build(adapter, "adamw", 1e-2, weight_decay=0.3)
    steps(model, adapter, made, 3)
    (_, t), *_ = adapter.sites()
    k, was, part = int(t.tensors()["up_drawn"]), t.up.detach().clone(), t.tensors()["up_part"]
    steps(model, adapter, made, 1)
    moved = (t.up != was) & (part != k)
    assert moved.any()


def test_every_part_is_trained_as_by_an_adamw_of_its_own():
    model, adapter = bert()
    (_, t), *_ = adapter.sites()
    part, start = t.tensors()["up_part"], t.up.detach().double()
    own = {k: start[part == k].clone().requires_grad_() for k in (1, 2, 3)}
    theirs = {k: torch.optim.AdamW([p], 3e-2, (0.8, 0.9), 1e-6, weight_decay=0.2) for k, p in own.items()}
    made = optim.build(adapter, "partwise-adamw:beta1=0.8,beta2=0.9,eps=1e-6", 3e-2, 0.2)

    def watch(_):
        k = int(t.tensors()["up_drawn"])
        own[k].grad = t.up.grad[part == k].double()
        theirs[k].step()

    steps(model, adapter, made, 12, watch)
    for k in (1, 2, 3):
        torch.testing.assert_close(t.up[part == k].double(), own[k].detach(), rtol=1e-4, atol=1e-6)


def test_a_saved_state_goes_on_with_the_same_bits():
    model, adapter = bert()
    made = optim.build(adapter, "auto", 1e-2)
    steps(model, adapter, made, 4)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    twin_model = copy.deepcopy(model)
    twin = adapters(twin_model)["default"]
    again = optim.build(twin, "auto", 1e-2)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    steps(model, adapter, made, 4)
    steps(twin_model, twin, again, 4)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), twin.parameters(), strict=True))
