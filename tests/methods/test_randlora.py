"""RandLoRA against the sum of scaled products, its rank, and PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.randlora import RandLoRA


@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape):
    at = check.make(RandLoRA(rank=4, alpha=6.0), *shape)
    k, p = min(shape), at.p
    lam, gamma = (p[name].detach().clone().requires_grad_() for name in ("lam", "gamma"))
    A, B = p["A"][:, :k], p["B"][: max(shape)]
    want = sum(B[:, 4 * j : 4 * j + 4] @ torch.diag(lam[j]) @ A @ torch.diag(gamma[j]) for j in range(3))
    want = 1.5 * (want if shape[0] >= shape[1] else want.T)
    torch.testing.assert_close(at.delta.detach(), want.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    expected = torch.autograd.grad((check.upstream(at)[1] * want).sum(), [lam, gamma])
    got = check.gradients(at)
    torch.testing.assert_close(got["lam"], expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["gamma"], expected[1], rtol=1e-9, atol=1e-9)


def test_every_rank_reaches_full_rank(check):
    for rank in (1, 3, 10, 32):
        at = check.make(RandLoRA(rank=rank), 15, 10)
        assert torch.linalg.matrix_rank(at.delta.detach()) == 10


def test_start_and_counts(check):
    check.starts_exactly(RandLoRA())
    check.starts_exactly(RandLoRA(rank=6, alpha=6.0), 50, 70)
    check.starts_exactly(RandLoRA(rank=6), 70, 50)
    check.counts(RandLoRA(rank=24))
    assert RandLoRA(rank=16).trainable(64, 96) == 4 * (16 + 64)
    assert RandLoRA(rank=16).trainable(64, 96) > RandLoRA(rank=32).trainable(64, 96)


def test_bases_are_shared_of_unit_variance_and_never_saved():
    model = nn.ModuleDict({"a": nn.Linear(40, 90), "b": nn.Linear(120, 60)})
    adapter = attach(model, RandLoRA(rank=8), targets=["a", "b"])
    a, b = (t for _, t in adapter.sites())
    assert a.A is b.A and a.B is b.B
    assert (a.A.shape, a.B.shape) == ((8, 60), (120, 64))
    assert abs(a.B.std().item() - 1) < 0.02
    assert set(adapter.state_dict()) == {f"{s}/{k}" for s in "ab" for k in ("lam", "gamma")}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_peft_has_the_same_forward(shape):
    peft = pytest.importorskip("peft")
    m, n = shape
    base, theirs = nn.ModuleDict({"proj": nn.Linear(n, m)}), nn.ModuleDict({"proj": nn.Linear(n, m)})
    theirs.load_state_dict(base.state_dict())
    config = peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, RandLoRA(rank=5, alpha=10.0), targets="proj").sites())
    with torch.no_grad():
        torch.testing.assert_close(layer.randlora_gamma["default"], tensors.gamma)
        layer.randlora_lambda["default"].copy_(tensors.lam.normal_().T)
        layer.randlora_gamma["default"].copy_(tensors.gamma.normal_())
    layer.randlora_A["default"] = tensors.A[:, None]
    # the columns of its B go with other rows of its A: column j r + k here is its k J + j, for J terms
    B = tensors.B.unflatten(1, (3, 5)).transpose(1, 2).flatten(1)
    layer.randlora_B["default"] = B.unflatten(1, (3, 5))
    x = torch.randn(2, 7, n)
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-4, atol=1e-4)


def test_options_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"alpha": 0.0}, "alpha must")):
        with pytest.raises(AddendaError, match=message):
            RandLoRA(**options)
