"""LoLDU against P L D U from Gaussian elimination with partial pivoting, written out."""

import pytest
import torch

from addenda.methods.loldu import LoLDU


def eliminate(W):
    """(P L, D, U) by the textbook, one column at a time."""
    W, (m, n) = W.clone(), W.shape
    k = min(m, n)
    L, rows = torch.zeros(m, k, dtype=W.dtype), list(range(m))
    for j in range(k):
        best = j + int(W[j:, j].abs().argmax())
        for t in (W, L):
            t[[j, best]] = t[[best, j]]
        rows[j], rows[best] = rows[best], rows[j]
        L[j, j] = 1
        for i in range(j + 1, m):
            L[i, j] = W[i, j] / W[j, j]
            W[i] = W[i] - L[i, j] * W[j]
    PL = torch.zeros_like(L)
    for i, row in enumerate(rows):
        PL[row] = L[i]
    D = W[:k].diagonal().clone()
    return PL, D, W[:k].triu() / D[:, None]


@pytest.mark.parametrize("options", [{}, {"alpha": 5.0}, {"train_sigma": True}], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", [(7, 7), (12, 7), (7, 12)])
def test_reference(check, shape, rank, options):
    at = check.make(LoLDU(rank=rank, **options), *shape)
    PL, D, U = eliminate(at.W)
    torch.testing.assert_close((PL * D) @ U, at.W)
    sigma = at.p["sigma"].detach() if "sigma" in at.p else options.get("alpha", rank) / rank
    d, PL, U = at.p["d"].detach(), PL[:, :rank], U[:rank]
    torch.testing.assert_close(at.delta.detach(), sigma * (PL * d) @ U, rtol=1e-9, atol=1e-9)
    check.forms_agree(at)

    inner = torch.diagonal(PL.T @ check.upstream(at)[1] @ U.T)
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close(got["d"], sigma * inner, rtol=1e-8, atol=1e-8)
        if "sigma" in got:
            torch.testing.assert_close(got["sigma"], d @ inner, rtol=1e-8, atol=1e-8)


def test_it_is_the_papers_residual_form(check):
    """W_res + σ P L diag(z) U with z = D + d, whatever σ."""
    at = check.make(LoLDU(rank=3, alpha=6), 12, 7)
    PL, D, U = (t[..., :3] if i < 2 else t[:3] for i, t in enumerate(eliminate(at.W)))
    residual = at.W - 2 * (PL * D) @ U
    want = residual + 2 * (PL * (D + at.p["d"].detach())) @ U
    torch.testing.assert_close(at.W + at.delta.detach(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("shape", [(7, 7), (12, 7), (7, 12)])
def test_a_trained_sigma_scales_the_whole_diagonal(check, shape, alpha):
    """W_res + σ P L diag(z) U with σ and z both trained, by autograd on the paper's own tensors."""
    at = check.make(LoLDU(rank=3, alpha=alpha, train_sigma="whole"), *shape)
    check.forms_agree(at)
    PL, D, U = (t[..., :3] if i < 2 else t[:3] for i, t in enumerate(eliminate(at.W)))
    first = 1.0 if alpha is None else alpha / 3
    residual = at.W - first * (PL * D) @ U
    sigma = (first + at.p["offset"].detach()).requires_grad_()
    z = (D + at.p["d"].detach()).requires_grad_()
    want = residual + sigma * (PL * z) @ U
    torch.testing.assert_close(at.W + at.delta.detach(), want.detach(), rtol=1e-9, atol=1e-9)
    (want * check.upstream(at)[1]).sum().backward()
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close(got["offset"], sigma.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(got["d"], z.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"alpha": 5.0}])
def test_whatever_sigma_trains_it_starts_exactly(check, options):
    for sigma in (True, "whole"):
        check.starts_exactly(LoLDU(rank=5, train_sigma=sigma, **options))
        check.counts(LoLDU(rank=5, train_sigma=sigma, **options))


def test_pivots_that_vanish_are_survived():
    method, zero, one = LoLDU(rank=4), torch.zeros(6, 5), torch.ones(5, 6)
    padded = torch.cat([torch.randn(2, 6), torch.zeros(4, 6)])
    for W in (zero, one, padded, torch.eye(5) * 1e-30):
        p = method.derive(W, None)
        assert all(bool(t.isfinite().all()) for t in p.values())
        delta = method.delta(W, p | {"d": torch.ones(4)})
        assert bool(delta.isfinite().all())
        assert delta.abs().max() <= max(1.0, 10 * W.abs().max())


def test_start_and_counts(check):
    for options in ({"rank": 1}, {"rank": 32, "alpha": 7.0}, {"rank": 50, "train_sigma": True}):
        check.starts_exactly(LoLDU(**options))
        check.starts_exactly(LoLDU(**options), 50, 70)
        check.counts(LoLDU(**options))
    assert "above" in LoLDU(rank=65).check(64, 96)
