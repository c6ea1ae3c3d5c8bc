"""HRA against chains of dense Householder matrices, its rank and orthogonality, and PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.base.random import Stream
from addenda.core.method.contract import to_float
from addenda.methods.hra import HRA


def chain(u, v):
    """H(u_1) H(v_1) H(u_2) H(v_2) …"""
    R = torch.eye(u.shape[1], dtype=u.dtype)
    for a in torch.stack([u, v], 1).flatten(0, 1):
        R = R @ (torch.eye(len(a), dtype=a.dtype) - 2 * torch.outer(a, a) / (a @ a))
    return R


@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("shape", [(9, 9), (15, 8), (8, 20)])
def test_reference(check, shape, rank):
    at = check.make(HRA(rank=rank), *shape)
    u, v = (at.p[k].detach().clone().requires_grad_() for k in "uv")
    new = at.W @ chain(u, v)
    torch.testing.assert_close((at.W + at.delta).detach(), new.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    want = torch.autograd.grad((check.upstream(at)[1] * new).sum(), (u, v))
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close((got["u"], got["v"]), want, rtol=1e-9, atol=1e-9)


def test_a_rotation_that_moves_few_directions(check):
    at = check.make(HRA(rank=4), 15, 12)
    new = (at.W + at.delta).detach()
    torch.testing.assert_close(new @ new.T, at.W @ at.W.T)
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(at.W))
    assert torch.linalg.matrix_rank(new - at.W) == 4
    B, Y = at.method._thin(at.p)
    R = torch.eye(12) + (B.T @ Y).detach()
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(R), torch.tensor(1.0, dtype=torch.float64))


def test_near_the_start_no_digits_are_lost(check):
    """Vectors 1e-13 apart: 1 − (u·v)² would be noise, and products with I have three digits left."""
    at = check.make(HRA(rank=4), 12, 12)
    u = at.p["u"].detach()
    p = {"u": u, "v": u + 1e-13 * torch.randn(u.shape, dtype=u.dtype)}
    small = at.method.delta(at.W, p)
    a, b = torch.nn.functional.normalize(u), torch.nn.functional.normalize(p["v"])
    first = sum(2 * (torch.outer(x, y - x) - torch.outer(y - x, y)) for x, y in zip(a, b, strict=True))
    assert (small - at.W @ first).norm() < 1e-6 * small.norm()  # the rest is of second order


def test_start_and_counts(check):
    for rank in (2, 8):
        check.starts_exactly(HRA(rank=rank))
        check.starts_exactly(HRA(rank=rank), 50, 70)
        check.counts(HRA(rank=rank))
    assert HRA(rank=8).trainable(64, 96) == 8 * 96


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rank", [2, 6])
def test_peft_has_the_same_forward_and_merge(rank):
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.HRAConfig(r=rank, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, HRA(rank=rank), targets="proj").sites())
    x = torch.randn(2, 7, 20)
    with torch.no_grad():
        both = torch.stack([tensors.u.normal_(), tensors.v.normal_()], 1).flatten(0, 1)
        layer.hra_u["default"].copy_(both.T)
        torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-4, atol=1e-4)
        layer.merge()
        new = tensors.method.effective(base["proj"].weight, to_float(tensors.tensors()))
        torch.testing.assert_close(new, layer.base_layer.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("default")
def test_vectors_start_as_long_as_pefts():
    peft = pytest.importorskip("peft")
    config = peft.HRAConfig(r=4, target_modules=["proj"])
    model = peft.get_peft_model(nn.ModuleDict({"proj": nn.Linear(500, 8)}), config)
    theirs = model.base_model.model["proj"].hra_u["default"].T
    own = HRA(rank=4).init(torch.zeros(8, 500), Stream(0, "site"), {})
    assert torch.equal(theirs[0::2], theirs[1::2])
    assert torch.equal(own["u"], own["v"])
    torch.testing.assert_close(own["u"].std(), theirs.std(), rtol=0.1, atol=0)
    assert float(own["u"].detach().abs().max()) <= 0.5**0.5


def test_options_and_shapes_are_checked():
    assert "above the input width 6" in HRA(rank=8).check(20, 6)
    for rank in (0, 3):
        with pytest.raises(AddendaError, match="rank must be even"):
            HRA(rank=rank)
