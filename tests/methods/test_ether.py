"""ETHER and ETHER+ against dense block-diagonal matrices, and the distances from the identity that the paper states."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.ether import ETHER


def outer(a):
    return torch.outer(a, a) / (a @ a)


def side(u, v=None):
    """blockdiag(I − u uᵀ + v vᵀ), or blockdiag(I − 2 u uᵀ)."""
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    if v is None:
        return torch.block_diag(*[eye - 2 * outer(a) for a in u])
    return torch.block_diag(*[eye - outer(a) + outer(b) for a, b in zip(u, v, strict=True)])


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("shape", "parts"), [((9, 9), 1), ((15, 6), 3), ((8, 20), 4)])
def test_reference(check, shape, parts, plus):
    at = check.make(ETHER(parts=parts, plus=plus), *shape)
    leaves = {k: t.detach().clone().requires_grad_() for k, t in at.p.items()}
    new = at.W @ side(leaves["u"], leaves.get("v"))
    new = side(leaves["out_u"], leaves["out_v"]) @ new if plus else new
    torch.testing.assert_close((at.W + at.delta).detach(), new.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    want = torch.autograd.grad((check.upstream(at)[1] * new).sum(), list(leaves.values()))
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close([got[k] for k in leaves], list(want), rtol=1e-9, atol=1e-9)


def test_a_reflection_is_orthogonal_and_always_as_far_from_the_identity(check):
    at = check.make(ETHER(parts=3, plus=False), 8, 12)
    eye = torch.eye(12, dtype=torch.float64)
    H = at.method.effective(eye, at.p).detach()
    torch.testing.assert_close(H @ H, eye)
    for i in range(0, 12, 4):
        block = (H - eye)[i : i + 4, i : i + 4]
        torch.testing.assert_close(block.norm(), torch.tensor(2.0, dtype=torch.float64))
    new = (at.W + at.delta).detach()
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(at.W))


@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_plus_stays_within_its_distance_however_far_it_trains(check, size):
    at, furthest = check.make(ETHER(parts=1), 8, 6), 0.0
    for _ in range(50):
        u, v = (size * torch.randn(1, 6, dtype=torch.float64) for _ in range(2))
        moved = at.method._change(torch.eye(6, dtype=torch.float64), u, v).norm()
        furthest = max(furthest, float(moved))
    assert 0.9 < furthest <= 2**0.5 + 1e-9


def test_start_and_counts(check):
    for parts in (1, 2, 4):
        check.starts_exactly(ETHER(parts=parts))
    check.starts_exactly(ETHER(parts=5), 50, 70)
    check.counts(ETHER(parts=2))
    check.counts(ETHER(parts=2, plus=False))
    assert ETHER().trainable(64, 96) == 320
    assert ETHER(plus=False).trainable(64, 96) == 96


def test_a_reflection_declares_its_start():
    method = ETHER(parts=2, plus=False)
    assert method.start.bound == 2
    assert "never the identity" in method.start.why
    assert ETHER().start.bound == 0
    model = nn.ModuleDict({"proj": nn.Linear(8, 12)})
    W, x = model["proj"].weight.detach().clone(), torch.randn(5, 8)
    tensors = next(t for _, t in attach(model, method, targets="proj").sites())
    new = method.effective(W, tensors.tensors()).detach()
    assert 0.1 * W.norm() < (new - W).norm() <= 2 * W.norm()
    torch.testing.assert_close(model["proj"](x), x @ new.T + model["proj"].bias)


def test_the_bias_is_left_alone(check):
    """Only W' stands before the bias, so a zero input gives it back."""
    at = check.make(ETHER(parts=2), 8, 6)
    torch.testing.assert_close(at.apply(torch.zeros(3, 6, dtype=torch.float64)).detach(), at.bias.expand(3, 8))


def test_options_and_shapes_are_checked():
    assert "does not divide the input width 70" in ETHER(parts=4).check(64, 70)
    assert "does not divide the output width 50" in ETHER(parts=4).check(50, 64)
    assert ETHER(parts=4, plus=False).check(50, 64) is None
    assert "blocks of one input" in ETHER(parts=4).check(8, 4)
    with pytest.raises(AddendaError, match="parts must be at least 1"):
        ETHER(parts=0)
