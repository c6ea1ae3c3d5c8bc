"""VeRA against diag(b) B diag(d) A summed term by term, and against PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.vera import VeRA


@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape):
    at = check.make(VeRA(rank=6), *shape)
    (m, n), b, d = shape, at.p["b"].detach(), at.p["d"].detach()
    A, B = at.p["A"][:, :n], at.p["B"][:m]
    want = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        for k in range(6):
            want[i] += b[i] * B[i, k] * d[k] * A[k]
    torch.testing.assert_close(at.delta.detach(), want, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)

    G = check.upstream(at)[1]
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close(got["b"], (G * ((B * d) @ A)).sum(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got["d"], ((b[:, None] * B).T @ G * A).sum(1), rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    check.starts_exactly(VeRA(rank=32))
    check.starts_exactly(VeRA(), 50, 70)
    check.counts(VeRA(rank=32))
    assert VeRA(rank=1024).trainable(768, 768) * 24 == 43_008  # RoBERTa-base, q and v: 0.043 M


def test_projections_are_shared_and_cut(check):
    model = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(20, 6), "c": nn.Linear(20, 6)})
    adapter = attach(model, VeRA(rank=4), targets=["a", "b", "c"])
    a, b, c = (t for _, t in adapter.sites())
    assert a.A is b.A is c.A
    assert a.A.shape == (4, 20)
    assert a.B.shape == (12, 4)
    assert set(adapter.state_dict()) == {f"{s}/{k}" for s in "abc" for k in "bd"}
    assert a.A.abs().max() <= (6 / 20) ** 0.5
    assert a.B.abs().max() <= (6 / 4) ** 0.5
    assert model["a"](torch.ones(3, 8)).shape == (3, 12)


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_forward():
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.VeraConfig(r=5, target_modules=["proj"], d_initial=0.1)
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, VeRA(rank=5), targets="proj").sites())
    with torch.no_grad():
        layer.vera_A["default"].copy_(tensors.A)
        layer.vera_B["default"].copy_(tensors.B)
        layer.vera_lambda_b["default"].copy_(tensors.b.normal_())
        torch.testing.assert_close(layer.vera_lambda_d["default"], tensors.d)
        layer.vera_lambda_d["default"].copy_(tensors.d.normal_())
    x = torch.randn(2, 7, 20)
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_start_without_gradients_is_refused():
    with pytest.raises(AddendaError, match="d_initial must not be 0"):
        VeRA(d_initial=0)
