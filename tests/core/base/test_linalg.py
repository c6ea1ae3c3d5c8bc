"""Singular triplets against LAPACK's own, whichever way they were found."""

import pytest
import torch

from addenda.core.base.linalg import by_gram, singular_triplets

SHAPES = [(40, 40), (60, 40), (40, 60), (100, 90)]


def made(m: int, n: int, smallest: float = 0.01):
    g = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    S = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), k, dtype=torch.float64)
    return (U * S) @ V.T, U, S, V


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [0.5, 0.01, 1e-9, 0.0])
@pytest.mark.parametrize("rank", [None, 1, 8, 30])
def test_triplets_are_those_that_the_matrix_was_made_of(shape, smallest, rank):
    W, U, S, V = made(*shape, smallest=max(smallest, 1e-12))
    k = rank or min(shape)
    if smallest == 0.0:  # not of full rank
        S[k // 2 :] = 0
        W = (U * S) @ V.T
    u, s, vt = singular_triplets(W, rank)
    assert u.shape == (shape[0], k)
    assert vt.shape == (k, shape[1])
    assert s.dtype == u.dtype == vt.dtype == torch.float64
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close(s, S[:k], rtol=1e-6, atol=1e-9)
    firm = int((S[:k] > 1e-3).sum())
    for found, true in ((u, U), (vt.T, V)):
        cosine = (found[:, :firm] * true[:, :firm]).sum(0).abs()
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-9)
        torch.testing.assert_close(found.T @ found, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close((u * s) @ vt, (U[:, :k] * S[:k]) @ V[:, :k].T, rtol=0, atol=1e-7)


def test_full_matrices():
    W, *_ = made(40, 60)
    U, _, Vt = singular_triplets(W, full_matrices=True)
    assert (U.shape, Vt.shape) == ((40, 40), (60, 60))
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_zero_matrix_has_triplets_too():
    U, S, Vt = singular_triplets(torch.zeros(6, 4), 2)
    assert (U.shape, S.tolist(), Vt.shape) == ((6, 2), [0.0, 0.0], (2, 4))


@pytest.mark.parametrize("shape", [(30, 30), (40, 12), (3, 20, 7)])
def test_the_gram_route_gives_what_a_decomposition_does(shape):
    g = torch.Generator().manual_seed(sum(shape))
    M = torch.randn(shape, generator=g, dtype=torch.float64)
    S, V = by_gram(M)  # pyright: ignore[reportGeneralTypeIssues]
    torch.testing.assert_close(S, torch.linalg.svdvals(M), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(M @ V @ V.mT, M)
    U = M @ V / S[..., None, :]
    square = U.mT @ U
    torch.testing.assert_close(square, torch.eye(shape[-1]).to(square).expand_as(square), atol=1e-6, rtol=0)


def test_the_gram_route_refuses_what_squaring_loses():
    g = torch.Generator().manual_seed(0)
    good = torch.randn(20, 5, generator=g, dtype=torch.float64)
    bad = good * torch.tensor([1, 1, 1, 1, 1e-7], dtype=torch.float64)
    assert by_gram(good) is not None
    assert by_gram(bad) is None
    assert by_gram(torch.stack([good, bad])) is None, "one of a stack is enough"
