"""SSVD against U (Σ + diag(d)) G Vᵀ put together from torch's own SVD, for all three forms of G."""

import pytest
import torch

from addenda import AddendaError
from addenda.methods.ssvd import SSVD

FORMS = ("strict", "approx", "none")


def rotation(turn, k, constraint):
    eye = torch.eye(k, dtype=torch.float64)
    if constraint == "none":
        return eye + turn
    row, column = torch.triu_indices(k, k, 1)
    K = torch.zeros(k, k, dtype=torch.float64).index_put((row, column), turn)
    K = K - K.T
    return (eye - K) @ torch.linalg.inv(eye + K) if constraint == "strict" else eye - 2 * K


@pytest.mark.parametrize("constraint", FORMS)
@pytest.mark.parametrize("shape", [(9, 9), (12, 7), (7, 12)])
def test_reference(check, shape, constraint):
    """W' = U (Σ + ΔΣ) G Vᵀ with all min(m, n) triplets, ΔΣ and G − I zero outside the first k."""
    at, k = check.make(SSVD(rank=4, constraint=constraint), *shape), min(shape)
    U, S, Vt = torch.linalg.svd(at.W, full_matrices=False)
    sign = torch.cat([(Vt[:4] * at.p["Vt"]).sum(1).sign(), torch.ones(k - 4)])
    U, Vt = U * sign, Vt * sign[:, None]
    turn, shift = (at.p[name].detach().clone().requires_grad_() for name in ("turn", "shift"))
    G = torch.block_diag(rotation(turn, 4, constraint), torch.eye(k - 4, dtype=torch.float64))
    new = U @ (torch.diag(S) + torch.diag(torch.cat([shift, torch.zeros(k - 4)]))) @ G @ Vt
    torch.testing.assert_close((at.W + at.delta).detach(), new.detach(), rtol=1e-9, atol=1e-9)
    check.forms_agree(at)
    want = torch.autograd.grad((check.upstream(at)[1] * new).sum(), (turn, shift))
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close((got["turn"], got["shift"]), want, rtol=1e-8, atol=1e-8)


def test_singular_values_are_those_asked_for(check):
    """A strict rotation leaves the spectrum to the shifts, and the output's directions to W."""
    at = check.make(SSVD(rank=4), 12, 9)
    S = torch.linalg.svdvals(at.W)
    S = torch.cat([S[:4] + at.p["shift"].detach(), S[4:]])
    new = (at.W + at.delta).detach()
    torch.testing.assert_close(torch.linalg.svdvals(new), S.abs().sort(descending=True).values)
    p = {**at.p, "shift": torch.zeros(4, dtype=torch.float64)}
    turned = at.W + at.method.delta(at.W, p).detach()
    torch.testing.assert_close(turned @ turned.T, at.W @ at.W.T)
    assert (turned - at.W).norm() > 0.1 * at.W.norm()


def test_approx_is_strict_to_first_order(check):
    at = check.make(SSVD(rank=4), 9, 9)
    for size in (1e-2, 1e-3):
        p = {"turn": at.p["turn"].detach() * size}
        off = SSVD(rank=4, constraint="approx")._rotation(p) - at.method._rotation(p)
        K = rotation(p["turn"], 4, "approx") - torch.eye(4)
        torch.testing.assert_close(off, -K @ K / 2, rtol=1e-9, atol=2 * size**3)


def test_start_and_counts(check):
    for constraint in FORMS:
        check.starts_exactly(SSVD(rank=8, constraint=constraint))
        check.starts_exactly(SSVD(constraint=constraint), 50, 70)
        check.counts(SSVD(rank=8, constraint=constraint))
    assert SSVD(rank=32).trainable(768, 768) == 32 * 33 // 2
    assert SSVD(rank=32, constraint="none").trainable(768, 768) == 32 * 33


def test_options_and_shapes_are_checked():
    assert "above" in SSVD(rank=9).check(8, 20)
    with pytest.raises(AddendaError, match="rank must be at least 2"):
        SSVD(rank=1)
    with pytest.raises(AddendaError, match="constraint must be one of"):
        SSVD(constraint="loose")
