"""LoRA, rsLoRA, PiSSA and OLoRA against sums of outer products, and against PEFT."""

import math

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.method.catalogue import build
from addenda.methods.lora import LoRA


@pytest.mark.parametrize(("options", "s"), [({}, 1), ({"alpha": 9.0}, 3), ({"alpha": 9.0, "scaling": "rs"}, 27**0.5)])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape, options, s):
    at = check.make(LoRA(rank=3, **options), *shape)
    A, B = at.p["A"].detach(), at.p["B"].detach()
    want = s * sum(torch.outer(B[:, k], A[k]) for k in range(3))
    torch.testing.assert_close(at.delta.detach(), want, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    G, got = check.upstream(at)[1], check.gradients(at)
    torch.testing.assert_close(got["A"], s * B.T @ G, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got["B"], s * G @ A.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_pissa_is_the_papers_residual_form(check, alpha):
    """W − s B₀A₀ + s (B₀+dB)(A₀+dA), with s B₀A₀ the best rank-3 approximation of W."""
    at, s = check.make(LoRA(rank=3, alpha=alpha, origin="pissa"), 12, 7), (alpha or 3) / 3
    U, S, Vh = torch.linalg.svd(at.W)
    best = sum(S[k] * torch.outer(U[:, k], Vh[k]) for k in range(3))
    A0, B0 = at.p["A0"], at.p["B0"]
    torch.testing.assert_close(s * B0 @ A0, best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A0.norm(dim=1), B0.norm(dim=0))
    new = at.W - best + s * (B0 + at.p["B"].detach()) @ (A0 + at.p["A"].detach())
    torch.testing.assert_close(at.W + at.delta.detach(), new, rtol=1e-9, atol=1e-9)
    check.forms_agree(at)
    G, got = check.upstream(at)[1], check.gradients(at)
    torch.testing.assert_close(got["A"], (s * (B0 + at.p["B"]).T @ G).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["B"], (s * G @ (A0 + at.p["A"]).T).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_olora_is_the_papers_residual_form(check, shape, alpha):
    """W − s Q_r R_r + s (Q_r + dB)(R_r + dA), with the one QR decomposition whose R has a positive diagonal."""
    at, s = check.make(LoRA(rank=3, alpha=alpha, origin="olora"), *shape), (alpha or 3) / 3
    Q, R = torch.linalg.qr(at.W)
    sign = R.diagonal().sign()
    Q, R = Q[:, : len(sign)] * sign, R[: len(sign)] * sign[:, None]
    torch.testing.assert_close(Q @ R, at.W, rtol=1e-9, atol=1e-9)
    A0, B0 = at.p["A0"], at.p["B0"]
    torch.testing.assert_close(B0, Q[:, :3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A0, R[:3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((B0 @ A0)[:, :3], at.W[:, :3], rtol=1e-9, atol=1e-9)  # the first columns, whole
    new = at.W - s * Q[:, :3] @ R[:3] + s * (Q[:, :3] + at.p["B"].detach()) @ (R[:3] + at.p["A"].detach())
    torch.testing.assert_close(at.W + at.delta.detach(), new, rtol=1e-9, atol=1e-9)
    check.forms_agree(at)
    G, got = check.upstream(at)[1], check.gradients(at)
    torch.testing.assert_close(got["A"], (s * (Q[:, :3] + at.p["B"]).T @ G).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["B"], (s * G @ (R[:3] + at.p["A"]).T).detach(), rtol=1e-9, atol=1e-9)


def test_olora_is_the_same_whatever_signs_the_decomposition_chose(check, monkeypatch):
    want, real = check.make(LoRA(rank=3, origin="olora"), 9, 9).p, torch.linalg.qr

    def other(W):
        Q, R = real(W)
        turn = torch.tensor([-1.0, 1.0, -1.0], dtype=W.dtype)
        return Q * turn, R * turn[:, None]

    monkeypatch.setattr(torch.linalg, "qr", other)
    got = check.make(LoRA(rank=3, origin="olora"), 9, 9).p
    assert torch.equal(got["A0"], want["A0"]) and torch.equal(got["B0"], want["B0"])


@pytest.mark.parametrize("origin", ["zero", "pissa", "olora"])
def test_a_pair_is_what_the_trainable_tensors_move(check, origin):
    """W + ΔW − s B A does not depend on them, and its factors turn ∂loss/∂W into their gradients."""
    method, rest = LoRA(rank=3, alpha=6.0, origin=origin), []
    at = check.make(method, 10, 8)
    for _ in range(2):
        pair = method.pair(at.p)
        rest.append((method.effective(at.W, at.p) - pair.scale * pair.B @ pair.A).detach())
        G, got = check.upstream(at)[1], check.gradients(at)
        torch.testing.assert_close(got[pair.right], pair.scale * pair.B.T @ G, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got[pair.left], pair.scale * G @ pair.A.T, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            at.p["A"].mul_(-2), at.p["B"].add_(1)
    torch.testing.assert_close(rest[0], rest[1], rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    for method in (
        LoRA(rank=4),
        LoRA(rank=4, alpha=3.0, origin="pissa"),
        LoRA(rank=4, alpha=3.0, origin="olora"),
        build("rslora:rank=2"),
        build("pissa"),
        build("olora"),
    ):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_has_the_same_forward_and_gradients(rs, dtype):
    peft = pytest.importorskip("peft")
    base = nn.ModuleDict({"proj": nn.Linear(20, 12)}).to(dtype)
    theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}).to(dtype)
    theirs.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rs, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    method = LoRA(rank=4, alpha=6, scaling="rs" if rs else "classic")
    tensors = next(t for _, t in attach(base, method, targets="proj").sites())
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(tensors.A)
        layer.lora_B["default"].weight.copy_(tensors.B.normal_())
    x = torch.randn(2, 5, 20).to(dtype)
    mine, want = base["proj"](x), layer(x)
    exact = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(mine, want, **exact)
    mine.float().sum().backward(), want.float().sum().backward()
    assert tensors.A.grad.dtype == torch.float32
    torch.testing.assert_close(tensors.A.grad, layer.lora_A["default"].weight.grad.float(), **exact)
    torch.testing.assert_close(tensors.B.grad, layer.lora_B["default"].weight.grad.float(), **exact)


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_olora():
    """The same factors up to signs, and the same model after the same steps away from them."""
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora", target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    tensors = next(t for _, t in attach(base, build("olora:rank=4,alpha=6"), targets="proj").sites())
    sign = A.detach().diagonal().sign()
    torch.testing.assert_close(tensors.A0, A.detach() * sign[:, None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tensors.B0, B.detach() * sign, rtol=1e-5, atol=1e-5)
    dA, dB = torch.randn_like(A), torch.randn_like(B)
    with torch.no_grad():
        A.add_(dA), B.add_(dB)
        tensors.A.copy_(dA * sign[:, None]), tensors.B.copy_(dB * sign)
    x = torch.randn(2, 5, 20)
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-5, atol=1e-5)


def test_dropout_acts_on_the_low_rank_path_in_training_only():
    model, x = nn.ModuleDict({"proj": nn.Linear(20, 12)}), torch.randn(64, 20)
    want = model["proj"](x).detach()
    tensors = next(t for _, t in attach(model, LoRA(rank=4, dropout=0.5), targets="proj").sites())
    assert torch.equal(model["proj"](x), want)  # B is still zero
    with torch.no_grad():
        tensors.B.normal_()
    clean = want + x @ (tensors.B @ tensors.A).T
    assert not torch.allclose(model["proj"](x), clean)
    many = sum(model["proj"](x).detach() for _ in range(2000)) / 2000
    torch.testing.assert_close(many, clean.detach(), rtol=0.3, atol=0.3)
    model.eval()
    torch.testing.assert_close(model["proj"](x), clean)


def test_rs_keeps_the_gradient_of_b_constant_in_the_rank(check):
    norms = {}
    for rank in (2, 8, 32):
        at = check.make(LoRA(rank=rank, alpha=8.0, scaling="rs"), 64, 64)
        at.p["A"] = (torch.rand(rank, 64, dtype=torch.float64) * 2 - 1) / 8
        at.p["B"], at.trainable = torch.zeros(64, rank, dtype=torch.float64, requires_grad=True), ["B"]
        norms[rank] = check.gradients(at)["B"].norm().item()
    assert max(norms.values()) / min(norms.values()) < 1.4


def test_options_and_shapes_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"dropout": 1.0}, "dropout must"), ({"alpha": "x"}, "alpha")):
        with pytest.raises(AddendaError, match=message):
            LoRA(**options)
    assert "above" in LoRA(rank=9).check(8, 20)
    with pytest.raises(AddendaError, match="no option 'rnak'"):
        build("lora:rnak=4")


def test_the_scale_of_rslora_falls_with_the_rank(check):
    """s = α/√r with one α: a product of more ranks is as large as its spread, not larger."""
    for rank in (1, 4, 8, 64):
        at = check.make(build(f"rslora:rank={rank}"), 64, 64)
        want = 8 / math.sqrt(rank) * at.p["B"] @ at.p["A"]
        torch.testing.assert_close(at.delta, want, rtol=1e-9, atol=1e-9)
    sizes = [build(f"rslora:rank={rank}").scale for rank in (1, 4, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)
    assert build("rslora:rank=16,alpha=none").scale == 4.0


def test_on_embeddings_it_can_start_as_loralib_does():
    """loralib: y = E[i] + (α/r) Aᵀ[i] Bᵀ with its A (r × rows) at zero and its B (width × r) from N(0, 1)."""
    rows, width, r, s = 30, 64, 4, 16 / 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(rows, width))
    ids, upstream = torch.randint(0, rows, (3, 7)), torch.randn(3, 7, width)
    E = model[0].weight.detach().double()
    adapter = attach(model, LoRA(rank=r, alpha=16.0, draw="normal"), targets="0")
    model.double()
    ((_, site),) = adapter.sites()
    p = site.tensors()
    theirs_A = torch.zeros(r, rows, dtype=torch.float64, requires_grad=True)
    theirs_B = p["A"].detach().T.clone().requires_grad_()
    start = theirs_B.detach()
    assert start.dtype == torch.float64 and not p["B"].any() and theirs_B.shape == (width, r)
    assert abs(start.mean()) < 0.2 and abs(start.std() - 1) < 0.15
    inside = (start.abs() < 1).double().mean()
    assert abs(inside - math.erf(0.5**0.5)) < 0.08  # 0.68 of a normal distribution, 0.58 of a uniform one
    ((_, small),) = attach(nn.Sequential(nn.Embedding(rows, width)), LoRA(rank=r), targets="0").sites()
    assert abs(float(start.std() / small.tensors()["A"].detach().std()) / (3 * width) ** 0.5 - 1) < 0.15

    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    for _ in range(3):
        y, reference = model(ids), E[ids] + s * theirs_A.T[ids] @ theirs_B.T
        torch.testing.assert_close(y, reference, rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
        (y * upstream).sum().backward()
        gA, gB = torch.autograd.grad((reference * upstream).sum(), (theirs_A, theirs_B))
        torch.testing.assert_close(p["B"].grad, gA.T, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(p["A"].grad, gB.T, rtol=1e-10, atol=1e-10)
        optimizer.step()
        with torch.no_grad():
            theirs_A -= 0.01 * gA
            theirs_B -= 0.01 * gB


def test_a_start_that_nothing_draws_is_refused():
    with pytest.raises(AddendaError, match="draw='normal' is how A starts"):
        LoRA(origin="pissa", draw="normal")
    assert build("rslora:draw=normal").draw == "normal"
