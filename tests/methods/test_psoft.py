"""PSOFT against U Σ (C − I) Vᵀ from torch's own SVD, its geometry, and PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.psoft import PSOFT


def turn(p, rank, vectors):
    """diag(1 + b) (I + Q)(I − Q)⁻¹ diag(1 + a)."""
    row, column = torch.triu_indices(rank, rank, 1)
    Q = torch.zeros(rank, rank, dtype=torch.float64).index_put((row, column), p["skew"])
    Q, eye = Q - Q.T, torch.eye(rank, dtype=torch.float64)
    R = (eye + Q) @ torch.linalg.inv(eye - Q)
    return torch.diag(1 + p["b"]) @ R @ torch.diag(1 + p["a"]) if vectors else R


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("shape", [(9, 9), (12, 7), (7, 12)])
def test_reference(check, shape, vectors):
    at = check.make(PSOFT(rank=4, vectors=vectors), *shape)
    U, S, Vt = torch.linalg.svd(at.W, full_matrices=False)
    sign = (Vt[:4] * at.p["A"]).sum(1).sign()
    U, S, Vt = U[:, :4] * sign, S[:4], Vt[:4] * sign[:, None]
    leaves = {k: at.p[k].detach().clone().requires_grad_() for k in at.trainable}
    new = at.W + U @ torch.diag(S) @ (turn(leaves, 4, vectors) - torch.eye(4)) @ Vt
    torch.testing.assert_close((at.W + at.delta).detach(), new.detach(), rtol=1e-9, atol=1e-9)
    check.forms_agree(at)
    want = torch.autograd.grad((check.upstream(at)[1] * new).sum(), list(leaves.values()))
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close([got[k] for k in leaves], list(want), rtol=1e-8, atol=1e-8)


def test_strict_keeps_the_principal_rows_and_the_spectrum(check):
    at = check.make(PSOFT(rank=4, vectors=False), 12, 9)
    new, best = (at.W + at.delta).detach(), at.p["B"] @ at.p["A"]
    principal = best + at.delta.detach()
    torch.testing.assert_close(principal @ principal.T, best @ best.T)
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(at.W))
    rest = at.W - best
    torch.testing.assert_close(new - principal, rest)
    assert at.delta.norm() > 0.1 * at.W.norm()


def test_start_and_counts(check):
    for vectors in (False, True):
        check.starts_exactly(PSOFT(rank=8, vectors=vectors))
        check.starts_exactly(PSOFT(vectors=vectors), 50, 70)
        check.counts(PSOFT(rank=8, vectors=vectors))
    assert PSOFT(rank=46).trainable(768, 768) == 46 * 45 // 2 + 92


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("vectors", [False, True])
def test_peft_has_the_same_forward(vectors):
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.PsoftConfig(r=5, psoft_alpha=5, psoft_mag_a=vectors, psoft_mag_b=vectors, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, PSOFT(rank=5, vectors=vectors), targets="proj").sites())
    A, B = layer._get_psoft_ab_cache_buffers("default")
    torch.testing.assert_close(B @ A, tensors.B @ tensors.A, rtol=1e-4, atol=1e-4)
    layer._set_psoft_ab_cache_buffers("default", tensors.A, tensors.B)  # signs of singular vectors are arbitrary
    orth, x = layer.psoft_R["default"], torch.randn(2, 7, 20)
    with torch.no_grad():
        orth.weight.copy_(tensors.skew.normal_())
        if vectors:
            orth.vector_a.copy_(1 + tensors.a.normal_(std=0.3))
            orth.vector_b.copy_(1 + tensors.b.normal_(std=0.3))
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-4, atol=1e-4)


def test_options_and_shapes_are_checked():
    assert "above" in PSOFT(rank=9).check(8, 20)
    with pytest.raises(AddendaError, match="rank must be at least 2"):
        PSOFT(rank=1)
