"""Trained Rank Pruning: cuts, pulls, and leaves everything else of the training alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import addenda as ad


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 2),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)


def batch(step: int):
    draw = torch.Generator().manual_seed(step)
    return torch.randn(5, 2, 7, 7, generator=draw), torch.randint(0, 3, (5,), generator=draw)


def train(model, optimizer, steps, trp=None):
    for step in steps:
        x, y = batch(step)
        if trp:
            trp.before_forward()
        F.cross_entropy(model(x), y).backward()
        if trp:
            trp.before_step()
        optimizer.step()
        optimizer.zero_grad()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_with_all_energy_it_is_plain_sgd_bit_for_bit():
    plain, own = net(), None
    train(plain, optimizer_of(plain), range(6))
    for scheme in ("channel", "spatial", "decoupled"):
        own = net()
        train(own, optimizer_of(own), range(6), ad.TrainedRankPruning(own, scheme, energy=1, period=1))
        assert same(plain, own)
    cut = net()
    train(cut, optimizer_of(cut), range(6), ad.TrainedRankPruning(cut, energy=0.8, period=3))
    assert not same(plain, cut)  # and the cut does something


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
def test_a_cut_loses_the_discarded_energy_and_no_more(scheme):
    model, e = net().double(), 0.8
    before = copy.deepcopy(model)
    trp = ad.TrainedRankPruning(model, scheme, energy=e, period=2)
    assert set(trp.places) == {"2", "5"} and "first" in trp.dense["0"]
    assert trp.before_forward() and not trp.before_forward()  # several forwards of one step cut once
    for path, place in trp.places.items():
        old, new = before[int(path)].weight, place.module.weight
        stack = {
            "channel": [old.flatten(1)],
            "spatial": [torch.einsum("ncij->cinj", old).flatten(2).flatten(0, 1)],
            "decoupled": [w.flatten(1) for w in old],  # pyright: ignore[reportGeneralTypeIssues]
        }[scheme]
        squares = sum(torch.linalg.svdvals(m).square() for m in stack)
        r = trp.ranks[path]
        torch.testing.assert_close((old - new).square().sum(), squares[r:].sum())
        assert squares[:r].sum() >= e * squares.sum() > squares[: r - 1].sum()
    once = copy.deepcopy(model)
    again = ad.TrainedRankPruning(model, scheme, energy=0.999999)
    again.before_forward()
    assert again.ranks == trp.ranks
    for a, b in zip(model.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert all(torch.equal(model[i].weight, before[i].weight) for i in (0, 7))


def test_the_pull_is_the_gradient_of_the_nuclear_norm():
    """λ and not λ times the period, on the steps of a cut only."""
    model, weight = net().double(), 0.01
    trp = ad.TrainedRankPruning(model, "spatial", energy=1, period=2, nuclear=weight)
    x, y = batch(0)
    for step in range(3):
        trp.before_forward()
        F.cross_entropy(model(x.double()), y).backward()
        plain = {p: q.module.weight.grad.clone() for p, q in trp.places.items()}
        trp.before_step()
        for path, place in trp.places.items():
            w = place.module.weight.detach().clone().requires_grad_()
            torch.linalg.svdvals(torch.einsum("ncij->cinj", w).flatten(2).flatten(0, 1)).sum().backward()
            expected = plain[path] + (weight * w.grad if step % 2 == 0 else 0)
            torch.testing.assert_close(place.module.weight.grad, expected, rtol=0, atol=1e-12)
        model.zero_grad()


def test_a_resumed_run_is_the_run():
    options = {"scheme": "channel", "energy": 0.9, "period": 3, "nuclear": 0.01}
    whole = net()
    train(whole, optimizer_of(whole), range(8), ad.TrainedRankPruning(whole, **options))
    first = net()
    optimizer, trp = optimizer_of(first), ad.TrainedRankPruning(first, **options)
    train(first, optimizer, range(4), trp)
    second = net()
    second.load_state_dict(first.state_dict())
    resumed, other = optimizer_of(second), ad.TrainedRankPruning(second, **options)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(trp.state_dict())
    train(second, resumed, range(4, 8), other)
    assert same(whole, second)
    with pytest.raises(ad.AddendaError, match=r"another run: period was 3 and is 4"):
        ad.TrainedRankPruning(second, **{**options, "period": 4}).load_state_dict(trp.state_dict())
    trp.before_forward()
    with pytest.raises(ad.AddendaError, match=r"under way"):
        trp.state_dict()


@pytest.mark.parametrize("each_epoch", [True, False])
def test_the_period_can_begin_anew_in_every_epoch_as_in_the_release(each_epoch):
    """The release: `for epoch: for batch_idx, …: if batch_idx % decouple_period == 0`. Here it is run by hand."""
    epochs, length, period = 3, 5, 3
    options = {"scheme": "decoupled", "energy": 0.8, "period": period}
    model, hand = net().double(), net().double()
    trp, seen = ad.TrainedRankPruning(model, **options), []
    kernels = {p: hand[int(p)].weight for p in trp.places}
    ours, theirs = optimizer_of(model), optimizer_of(hand)
    for epoch in range(epochs):
        if each_epoch:
            trp.start_epoch()
        for batch_idx in range(length):
            x, y = batch(epoch * length + batch_idx)
            seen.append(trp.before_forward())
            F.cross_entropy(model(x.double()), y).backward()
            trp.before_step()
            count = batch_idx if each_epoch else epoch * length + batch_idx
            assert seen[-1] == (count % period == 0)
            if count % period == 0:
                for path, kernel in kernels.items():
                    U, S, Vt = torch.linalg.svd(kernel.detach().flatten(2))
                    S[:, trp.ranks[path] :] = 0
                    full = torch.zeros(*kernel.shape[:2], Vt.shape[-1], dtype=torch.float64)
                    full.diagonal(dim1=1, dim2=2).copy_(S)
                    kernel.data = (U @ full @ Vt).view_as(kernel)
            F.cross_entropy(hand(x.double()), y).backward()
            for o in (ours, theirs):
                o.step()
                o.zero_grad()
    for path, kernel in kernels.items():
        torch.testing.assert_close(model[int(path)].weight, kernel, rtol=1e-9, atol=1e-9)
    cuts = [step for step, cut in enumerate(seen) if cut]
    assert cuts == ([0, 3, 5, 8, 10, 13] if each_epoch else [0, 3, 6, 9, 12])


def test_a_run_resumed_within_an_epoch_goes_on_counting_from_its_start():
    model = net()
    trp = ad.TrainedRankPruning(model, energy=0.9, period=3)
    train(model, optimizer_of(model), range(5), trp)
    assert "begun" in trp.state_dict()
    trp.start_epoch()  # at step 5
    train(model, optimizer_of(model), range(5, 7), trp)
    other = ad.TrainedRankPruning(model, energy=0.9, period=3)
    other.load_state_dict(trp.state_dict())
    assert not other.before_forward()  # step 7: 5 and 8 are cut
    with pytest.raises(ad.AddendaError, match="Step 7 is under way"):
        other.start_epoch()
    old = {k: v for k, v in trp.state_dict().items() if k != "begun"}
    other.load_state_dict({**old, "step": 6})
    assert other.before_forward()  # as it was before there were epochs
    with pytest.raises(ad.AddendaError, match="another run"):
        other.load_state_dict({**old, "step": 4, "begun": 5})


def test_it_ends_in_two_convolutions_that_compute_the_same():
    model = net()
    trp = ad.TrainedRankPruning(model, energy=0.7, period=4)
    train(model, optimizer_of(model), range(5), trp)
    trp.before_forward()
    assert trp.step == 5
    x, _ = batch(0)
    model.eval()
    made = trp.factorise(example=x)
    assert {p: r for p, r in made.ranks.items() if r} and made.rule == "channel, energy = 0.7"
    trp._cut()  # a last cut in the dense form is the same function
    low = {r.path for r in made.layers if r.rank is not None}
    if low == set(trp.places):
        torch.testing.assert_close(made.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert trp.factorise(keep=0.5).rule == "channel, keep = 0.5"
    budget = ad.TrainedRankPruning(net(), keep=0.5, example=x)
    budget.before_forward()
    spent = budget.factorise(ranks=budget.ranks)
    assert sum(r.macs[1] for r in spent.layers) <= 0.5 * sum(r.macs[0] for r in spent.layers)


class Aside(nn.Module):
    """A layer that only training calls, beside others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = (nn.Conv2d(n, 8, 3, padding=1) for n in (2, 8, 8))

    def forward(self, x):
        h = self.b(self.a(x))
        return h + self.aux(h) if self.training else h


def test_layers_that_the_example_does_not_call_are_left_out():
    model, x = Aside().train(), torch.randn(2, 2, 6, 6)
    trp = ad.TrainedRankPruning(model, keep=0.5, example=x, period=1)
    trp.before_forward()
    assert set(trp.ranks) == {"b"} and trp.dense["aux"] == "never called with this example"
    made = ad.factorise(model, keep=0.5, example=x)
    again = trp.factorise()
    assert again.ranks == made.ranks and again.dense["aux"] == made.dense["aux"]
    with pytest.raises(ad.AddendaError, match="No layer that could be cut is called with this example: aux"):
        ad.TrainedRankPruning(model, keep=0.5, example=x, targets=["aux"])


def test_wrong_use_says_what_to_do():
    model = net()
    trp = ad.TrainedRankPruning(model, energy=0.5, period=1)
    with pytest.raises(ad.AddendaError, match="without before_forward"):
        trp.before_step()
    trp.before_forward()
    with torch.no_grad():
        model[5].weight.mul_(2)
    with pytest.raises(ad.AddendaError, match=r"5 changed since .* before_step\(\) was not called"):
        trp.before_forward()
    pulling = ad.TrainedRankPruning(model, energy=0.5, nuclear=0.1)
    pulling.before_forward()
    with pytest.raises(ad.AddendaError, match="No layer has a gradient"):
        pulling.before_step()
    with torch.no_grad():
        model[5].weight[0] = float("inf")
    before = copy.deepcopy(model)
    with pytest.raises(ad.AddendaError, match=r"At step 0 the weights of 5 are not finite; nothing was cut"):
        ad.TrainedRankPruning(model, energy=0.5).before_forward()
    assert torch.equal(before[2].weight, model[2].weight)
    for options, why in (
        ({}, "exactly one of"),
        ({"energy": 2}, "energy must be"),
        ({"energy": 0.9, "period": 0}, "period must be at least 1"),
        ({"energy": 0.9, "nuclear": -1}, "nuclear must be at least 0"),
        ({"energy": 0.9, "scheme": "channels"}, "Did you mean 'channel'"),
    ):
        with pytest.raises(ad.AddendaError, match=why):
            ad.TrainedRankPruning(model, **options)
    with pytest.raises(ad.AddendaError, match="require no gradient"):
        ad.TrainedRankPruning(model.requires_grad_(False), energy=0.9)
    with pytest.raises(ad.AddendaError, match="can be factorised"):
        ad.TrainedRankPruning(nn.Sequential(nn.Linear(3, 3)), energy=0.9)


def test_a_trainer_does_what_the_loop_does_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x, labels):
            logits = self.inner(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": a, "labels": b} for step in range(6) for a, b in zip(*batch(step), strict=True)]

    def trainer(folder, steps=6):
        model = Net()
        trp = ad.TrainedRankPruning(model, energy=0.8, period=2, nuclear=0.01)
        given = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=5, learning_rate=0.1, save_steps=3, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_steps=99, max_grad_norm=0, optim="sgd",
            lr_scheduler_type="constant", train_sampling_strategy="sequential",
        )  # fmt: skip
        return transformers.Trainer(model, given, train_dataset=rows, callbacks=[trp.callback()]), trp

    whole, trp = trainer(tmp_path / "one")
    whole.train()
    hand = Net()
    own = ad.TrainedRankPruning(hand, energy=0.8, period=2, nuclear=0.01)
    train(hand.inner, torch.optim.SGD(hand.parameters(), 0.1), range(6), own)
    assert trp.step == 6 and same(hand, whole.model)
    again, trp = trainer(tmp_path / "one")
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert trp.step == 6 and same(again.model, whole.model)
    (tmp_path / "one" / "checkpoint-3" / "trained_rank_pruning.json").unlink()
    with pytest.raises(ad.AddendaError, match="holds no step"):
        trainer(tmp_path / "one")[0].train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))


def test_a_trainer_begins_every_epoch_with_a_cut_and_resumes_within_one():
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    trp = ad.TrainedRankPruning(net(), energy=0.9, period=3)
    callback = trp.callback(each_epoch=True)
    for step, epoch, begun in ((0, 0, 0), (5, 1.0, 5), (7, 1.4, 5), (10, 2 - 1e-12, 10)):
        trp.step = step
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert trp.begun == begun
    trp.step = 15
    trp.callback().on_epoch_begin(None, SimpleNamespace(epoch=3), None)
    assert trp.begun == 10


@pytest.mark.parametrize("options", [
    {"nuclear": float("inf")}, {"nuclear": float("nan")}, {"nuclear": -1.0}, {"nuclear": "1"}, {"period": 0},
    {"period": True}, {"period": 1.5}, {"value": float("inf")}, {"value": 0.0}, {"energy": 0.0}, {"energy": "0.9"},
    {"energy": 1.5}, {"relative": float("nan")}, {"keep": 1.0}, {"keep": True}, {"ratio": 0.5},
])  # fmt: skip
def test_impossible_numbers_are_refused(options):
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    rule = {} if {*options} & {"value", "energy", "relative", "keep"} else {"energy": 0.9}
    with pytest.raises(ad.AddendaError, match=next(iter(options))):
        ad.TrainedRankPruning(model, **(rule | options))
    if {*options} & {"value", "energy", "relative", "keep"}:
        with pytest.raises(ad.AddendaError, match=next(iter(options))):
            ad.factorise(model, "channel", **options)
