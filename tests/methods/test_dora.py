"""DoRA against W' = diag(mag / ‖V‖) V written out row by row, and against PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach, merge
from addenda.methods.dora import DoRA


@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape):
    at = check.make(DoRA(rank=3, alpha=7), *shape)
    p = {k: t.detach() for k, t in at.p.items()}
    for i, row in enumerate(at.W):
        V = row + 7 / 3 * sum(p["B"][i, k] * p["A"][k] for k in range(3))
        want = (row.norm() + p["magnitude"][i]) * V / V.norm()
        torch.testing.assert_close((at.W + at.delta)[i], want, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)


def test_gradients_hold_the_norm_constant(check):
    at = check.make(DoRA(rank=3, alpha=6), 10, 17)
    _, G = check.upstream(at)
    V = at.W + 2 * at.p["B"] @ at.p["A"]
    c = ((at.W.norm(dim=1) + at.p["magnitude"]) / V.norm(dim=1))[:, None]
    want = {
        "A": 2 * at.p["B"].T @ (c * G),
        "B": 2 * (c * G) @ at.p["A"].T,
        "magnitude": (G * V).sum(1) / V.norm(dim=1),
    }
    for through in ("delta", "apply"):
        for k, got in check.gradients(at, through).items():
            torch.testing.assert_close(got, want[k].detach(), rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    check.starts_exactly(DoRA(rank=4))
    check.starts_exactly(DoRA(rank=4, alpha=9), 50, 70)
    check.counts(DoRA(rank=5))


def test_the_start_is_exact_on_awkward_weights(check):
    """Rows of zeros, huge and tiny rows: the ratio of the norms is 1 in every one."""
    W = torch.randn(6, 9) * torch.tensor([0.0, 1e-30, 1e-12, 1.0, 1e6, 1e15])[:, None]
    method = DoRA(rank=2)
    p = method.derive(W, None)
    p |= {"A": torch.randn(2, 9), "B": torch.zeros(6, 2, requires_grad=True), "magnitude": torch.zeros(6)}
    assert torch.equal(method.effective(W, p), W)
    p["B"] = torch.randn(6, 2)
    assert bool(method.effective(W, p).isfinite().all())


def test_one_row_keeps_its_direction_when_only_the_magnitude_moves(check):
    at = check.make(DoRA(rank=2), 8, 8)
    at.p["B"] = torch.zeros_like(at.p["B"])
    new = at.W + at.delta.detach()
    cosine = torch.cosine_similarity(new, at.W)
    want = torch.sign(at.W.norm(dim=1) + at.p["magnitude"].detach())
    torch.testing.assert_close(cosine, want)


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_forward_and_gradients():
    peft = pytest.importorskip("peft")
    base = nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, DoRA(rank=4, alpha=6), targets="proj").sites())
    with torch.no_grad():
        tensors.B.normal_(0, 0.2), tensors.magnitude.normal_(0, 0.1)
        layer.lora_A["default"].weight.copy_(tensors.A)
        layer.lora_B["default"].weight.copy_(tensors.B)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.copy_(base["proj"].weight.norm(dim=1) + tensors.magnitude)
    x = torch.randn(5, 20)
    mine, want = base["proj"](x), layer(x)
    torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)
    mine.square().sum().backward(), want.square().sum().backward()
    torch.testing.assert_close(tensors.magnitude.grad, magnitude.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors.B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors.A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)


def test_options_and_shapes_are_checked():
    with pytest.raises(AddendaError, match="rank must be at least 1"):
        DoRA(rank=0)
    for alpha in (0.0, -1.0):
        with pytest.raises(AddendaError, match="alpha must be above 0"):
            DoRA(alpha=alpha)
    assert "above" in DoRA(rank=9).check(8, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_base_of_now_where_it_trains_too(dtype):
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    adapter = attach(model, "dora:rank=2,alpha=4", freeze=False)
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(0.5, 3, 16)[:, None])
    x = torch.randn(3, 16, dtype=dtype)
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias)), "still exact at the start"
    ((_, t),) = adapter.sites()
    with torch.no_grad():
        t.B.normal_()
    W = model[0].weight.detach().double()
    V = W + 2 * (t.B.double() @ t.A.double())
    want = W.norm(dim=1) / V.norm(dim=1)
    got = t.method.magnitude(model[0].weight, t.tensors())
    torch.testing.assert_close(got.double(), want, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0}))
    report = merge(model, verify=x)
    assert report
