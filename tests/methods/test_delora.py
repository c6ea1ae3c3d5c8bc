"""DeLoRA against sums of normalised outer products, its bound, and PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError
from addenda.methods.delora import DeLoRA


def dense(A, B, strength, w):
    """(λ/r) Σ b aᵀ / (‖b‖ ‖a‖), column j times w_j."""
    r = len(A)
    return sum(torch.outer(B[:, i], A[i]) / (B[:, i].norm() * A[i].norm()) for i in range(r)) * w * strength / r


def now_and_start(at, strength):
    """The dense change with its own leaves (dA, dB, dλ), and the change that the start stands for."""
    p, w = at.p, at.W.norm(dim=0) if at.method.norm == "columns" else at.W.norm()
    leaves = [p[k].detach().clone().requires_grad_() for k in ("A", "B", "strength")]
    now = dense(p["A0"] + leaves[0], p["B0"] + leaves[1], strength + leaves[2], w)
    return leaves, now, dense(p["A0"], p["B0"], strength, w)


@pytest.mark.parametrize("norm", ["columns", "whole"])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape, norm):
    at = check.make(DeLoRA(rank=3, strength=2.0, norm=norm), *shape)
    leaves, now, start = now_and_start(at, 2.0)
    torch.testing.assert_close(at.delta.detach(), (now - start).detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    want = torch.autograd.grad((check.upstream(at)[1] * now).sum(), leaves)
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        for key, expected in zip(("A", "B", "strength"), want, strict=True):
            torch.testing.assert_close(got[key], expected, rtol=1e-8, atol=1e-8)


def test_strength_bounds_the_change_whatever_the_factors_are(check):
    for norm in ("columns", "whole"):
        at = check.make(DeLoRA(rank=4, strength=0.5, norm=norm), 15, 10)
        at.p["A"], at.p["B"] = 100 * at.p["A"], 100 * at.p["B"]
        at.p["strength"] = torch.zeros((), dtype=torch.float64)
        _, now, start = now_and_start(at, 0.5)
        bound = 0.5 * (at.W.norm() if norm == "whole" else at.W.norm(dim=0).max())
        assert (at.delta + start).norm() <= bound
        torch.testing.assert_close(at.delta + start, now.detach())


def test_the_first_step_is_as_small_as_the_learning_rate(check):
    moved = []
    for rate in (1e-4, 1e-3):
        at = check.make(DeLoRA(), 64, 64)
        for key in at.trainable:
            at.p[key] = torch.zeros_like(at.p[key]).requires_grad_()
        signs = {key: grad.sign() for key, grad in check.gradients(at).items()}
        at.p = at.p | {key: at.p[key].detach() - rate * sign for key, sign in signs.items()}  # Adam's first step
        moved.append((at.delta.norm() / at.W.norm()).item())
    assert moved[0] < 0.01
    assert moved[1] / moved[0] == pytest.approx(10, rel=0.1)


def test_start_and_counts(check):
    for method in (DeLoRA(rank=4), DeLoRA(rank=3, strength=0.1, norm="whole")):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)
    assert DeLoRA(rank=8).trainable(64, 96) == 8 * 160 + 1


@pytest.mark.filterwarnings("default")
def test_pefts_change_is_this_one_plus_the_start(check):
    peft = pytest.importorskip("peft")
    at = check.make(DeLoRA(rank=3, strength=4.0), 12, 20)
    theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs["proj"].weight.data.copy_(at.W)
    config = peft.DeloraConfig(r=3, delora_lambda=4, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    with torch.no_grad():
        layer.delora_A["default"].copy_(at.p["A0"] + at.p["A"])
        layer.delora_B["default"].copy_(at.p["B0"] + at.p["B"])
        layer.delora_lambda["default"].copy_(4 + at.p["strength"])
    _, _, start = now_and_start(at, 4.0)
    mine = (at.delta + start).detach().float()
    torch.testing.assert_close(mine, layer.get_delta_weight("default").detach(), rtol=1e-4, atol=1e-5)


def test_options_and_shapes_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"strength": 0.0}, "strength must"), ({"norm": "x"}, "norm")):
        with pytest.raises(AddendaError, match=message):
            DeLoRA(**options)
    assert "above" in DeLoRA(rank=9).check(8, 20)
