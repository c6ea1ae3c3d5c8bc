"""AdaLoRA's budget against a slow reference: the penalty by autograd, scores and schedule number by number."""

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from addenda import AddendaError, attach, optim
from addenda.core.method.contract import Factors, WeightMethod
from addenda.optim.budget import BudgetedAdamW


@dataclass(frozen=True)
class Triplets(WeightMethod):
    """The method's tensors, by itself."""

    rank: int = 4
    target_rank: int = 2

    def init(self, W, rng, p):
        m, n = W.shape
        return {
            "A": nn.Parameter(rng.normal(self.rank, n, std=0.2)),
            "B": nn.Parameter(rng.normal(m, self.rank, std=0.2)),
            "E": nn.Parameter(torch.zeros(self.rank)),
        }

    def factors(self, p, shape):
        return Factors(p["B"], p["A"], p["E"])

    def trainable(self, m, n):
        return self.rank * (m + n + 1)


STEPS = 20
OPTIONS = {"steps": STEPS, "start": 0.1, "end": 0.3, "every": 3}


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) - torch.linspace(-1, 1, 4)).square().mean()


def train(model, adapter, made, ids, steps):
    for _ in range(steps):
        loss_of(model, ids).backward()
        made.step()
        adapter.step()
        made.zero_grad()


def slow_budget(t: int, full: int, target: int) -> int:
    if t <= 2:
        return full
    if t >= 14:
        return target
    return target + int((full - target) * ((14 - t) / 12) ** 3)


def decaying(adapter):
    """Groups of a reference: the copy of the head's bias is pulled nowhere."""
    vectors = [p for k, p in adapter.named_parameters() if k == "score.bias/value"]
    rest = [p for k, p in adapter.named_parameters() if k != "score.bias/value"]
    return [{"params": rest}, {"params": vectors, "weight_decay": 0.0}]


def test_against_a_slow_reference(tiny, ids):
    other = copy.deepcopy(tiny)
    adapter, control = attach(tiny, Triplets(), also_train=["score"]), attach(other, Triplets(), also_train=["score"])
    made = BudgetedAdamW(adapter, 2e-2, 0.1, **OPTIONS)
    theirs = torch.optim.AdamW(decaying(control), lr=2e-2, weight_decay=0.1)
    sites = [t for _, t in control.sites() if "E" in t._parameters]
    own = [t for _, t in adapter.sites() if "E" in t._parameters]
    full, target = 4 * len(sites), 2 * len(sites)
    mean: dict = {}
    change: dict = {}
    live, revived = [], False
    for step in range(1, STEPS + 1):
        loss = loss_of(other, ids)
        norms = [torch.linalg.norm(t.A @ t.A.T - torch.eye(4)) for t in sites]
        norms += [torch.linalg.norm(t.B.T @ t.B - torch.eye(4)) for t in sites]
        (loss + 0.5 * sum(norms) / len(norms)).backward()
        theirs.step()
        with torch.no_grad():
            if step < 14:
                for t in sites:
                    for p in (t.A, t.B, t.E):
                        now = (p * p.grad).abs()
                        mean[p] = 0.85 * mean.get(p, 0) + 0.15 * now
                        change[p] = 0.85 * change.get(p, 0) + 0.15 * (now - mean[p]).abs()
            if step > 2 and (step % 3 == 0 or step >= 14):
                scores = [
                    float(mean[t.E][i] * change[t.E][i])
                    + float((mean[t.A][i] * change[t.A][i]).mean())
                    + float((mean[t.B][:, i] * change[t.B][:, i]).mean())
                    for t in sites
                    for i in range(4)
                ]
                away = full - slow_budget(step, full, target)
                lowest = sorted(range(full), key=lambda k: scores[k])[:away]
                for k in lowest:
                    sites[k // 4].E[k % 4] = 0
        theirs.zero_grad()
        before = torch.cat([t.E.detach() for t in own]) != 0
        train(tiny, adapter, made, ids, 1)
        after = torch.cat([t.E.detach() for t in own]) != 0
        if step > 2 and (step % 3 == 0 or step >= 14):
            assert after.tolist() == (torch.cat([t.E.detach() for t in sites]) != 0).tolist(), step
            assert int(after.sum()) == slow_budget(step, full, target)
            live.append(after)
        elif step > 3:
            revived |= bool((after & ~before).any())
        for a, b in zip(adapter.parameters(), control.parameters(), strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-3, atol=1e-4)
    assert revived
    assert torch.equal(live[-1], live[-2])
    assert int(live[-1].sum()) == target
    assert len({int(t.E.count_nonzero()) for t in own}) > 1  # handed out over all sites, not two to each


def test_the_target_of_the_start_rank_prunes_nothing(tiny, ids):
    adapter = attach(tiny, Triplets(4, 4))
    train(tiny, adapter, BudgetedAdamW(adapter, 1e-2, **OPTIONS), ids, STEPS)
    assert all(bool(t.E.all()) for _, t in adapter.sites())


def test_without_a_penalty_and_a_budget_it_is_adamw(tiny, ids):
    found = []
    for model, budgeted in ((copy.deepcopy(tiny), True), (copy.deepcopy(tiny), False)):
        adapter = attach(model, Triplets(4, 4), also_train=["score"])
        made = (
            BudgetedAdamW(adapter, 1e-2, 0.1, penalty=0.0, **OPTIONS)
            if budgeted
            else torch.optim.AdamW(decaying(adapter), lr=1e-2, weight_decay=0.1, fused=True)
        )
        train(model, adapter, made, ids, 6)
        found.append(adapter.state_dict())
    assert all(torch.equal(t, found[1][k]) for k, t in found[0].items())


def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(tiny, ids):
    other = copy.deepcopy(tiny)
    adapter = attach(tiny, Triplets())
    made = BudgetedAdamW(adapter, 1e-2, **OPTIONS)
    train(tiny, adapter, made, ids, 10)
    file = io.BytesIO()
    torch.save([made.state_dict(), adapter.state_dict()], file)
    train(tiny, adapter, made, ids, STEPS - 10)
    again = attach(other, Triplets())
    resumed = BudgetedAdamW(again, 1e-2, **OPTIONS)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    again.load_state_dict(values)
    train(other, again, resumed, ids, STEPS - 10)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in adapter.state_dict().items())


def test_what_contradicts_itself_is_refused(tiny):
    adapter = attach(tiny, Triplets())
    for options, message in (
        ({"start": 0.7, "end": 0.3}, r"start \+ end below 1, got 0.7 and 0.3"),
        ({"start": -0.1}, "shares of the run"),
        ({"every": 0}, "every from 1"),
        ({"penalty": -1.0}, "penalty from 0"),
        ({"beta_importance": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(AddendaError, match=message):
            BudgetedAdamW(adapter, 1e-2, steps=10, **options)
    with pytest.raises(AddendaError, match="target_rank at most as high"):
        BudgetedAdamW(attach(tiny, Triplets(2, 3), name="more"), 1e-2, steps=10)
    with pytest.raises(AddendaError, match=r"no site of adapter 'plain' \(lora\)"):
        BudgetedAdamW(attach(tiny, "lora:rank=2", name="plain"), 1e-2, steps=10)


def test_the_method_is_trained_by_it(tiny, ids):
    adapter = attach(tiny, "adalora:rank=4,target_rank=2")
    with pytest.raises(AddendaError, match="wants the number of steps"):
        optim.build(adapter)
    made = optim.build(adapter, "auto", 3e-2, steps=60)
    assert isinstance(made, BudgetedAdamW)
    before = float(loss_of(tiny, ids).detach())
    train(tiny, adapter, made, ids, 60)
    assert float(loss_of(tiny, ids).detach()) < 0.3 * before
    kept = [int(t.E.count_nonzero()) for _, t in adapter.sites()]
    assert sum(kept) == 2 * len(kept)


def test_stacked_experts_share_the_budget():
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(3, 8, 6))
    adapter = attach(model, Triplets(), targets="experts")
    made = BudgetedAdamW(adapter, 1e-2, **OPTIONS)
    ((_, t),) = adapter.sites()
    for _ in range(STEPS):
        for p in (t.A, t.B, t.E):
            p.grad = torch.randn(p.shape)
        made.step()
    assert t.E.shape == (3, 4)
    assert int(t.E.count_nonzero()) == 6
