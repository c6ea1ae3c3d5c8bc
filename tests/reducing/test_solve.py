"""The routes against dense algebra: optima from numpy's SVD of the data themselves, in float64."""

import numpy as np
import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.reducing.moments import Moments
from addenda.reducing.solve import ROUTES, solve

SHAPES = [(12, 20), (20, 12), (16, 16)]
TOKENS = 200


def data(m: int, n: int, shift: float = 0.0):
    g = torch.Generator().manual_seed(m * 100 + n)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    X = torch.randn(TOKENS, n, generator=g, dtype=torch.float64) @ mix + shift
    W = torch.randn(m, n, generator=g, dtype=torch.float64)
    moments = Moments(n)
    moments.add(X)
    return W, X, moments


def output_error(W, X, low):
    Y = X @ W.T
    made = X @ (low.B @ low.A).T
    if low.mean is not None:
        made = made + low.bias(W, None)
    return float((Y - made).square().sum() / Y.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_three_routes_of_one_optimum_agree_and_lose_the_tail_of_the_outputs(shape, rank):
    W, X, moments = data(*shape)
    tail = np.linalg.svd((X @ W.T).numpy(), compute_uv=False) ** 2  # Eckart and Young, on the outputs themselves
    best = float(tail[rank:].sum() / tail.sum())
    products = {how: solve(W, moments, how, rank=rank) for how in ("lord", "svd-llm", "drone")}
    first = products["lord"].B @ products["lord"].A
    for how, low in products.items():
        assert float((low.B @ low.A - first).norm() / first.norm()) < 1e-10, how
        assert output_error(W, X, low) == pytest.approx(best, rel=1e-9, abs=1e-14)
        assert float(low.errors[rank]) == pytest.approx(best, rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ROUTES)
def test_full_rank_is_the_layer_itself_and_ranks_are_nested(shape, how):
    W, X, moments = data(*shape)
    fisher = torch.rand(shape[0], dtype=torch.float64) + 0.1
    low = solve(W, moments, how, fisher=fisher)
    assert low.rank == min(shape)
    assert float((low.B @ low.A - W).norm() / W.norm()) < 1e-9
    for rank in (2, 7):
        alone = solve(W, moments, how, rank=rank, fisher=fisher)
        nested = low.first(rank)
        torch.testing.assert_close(nested.B @ nested.A, alone.B @ alone.A, rtol=0, atol=1e-10)
        assert float(low.errors[rank]) == pytest.approx(output_error(W, X, nested), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_asvd_and_fwsvd_are_singular_value_decompositions_of_weighted_matrices(shape):
    W, X, moments = data(*shape)
    r, d = 4, torch.rand(shape[0], dtype=torch.float64) + 0.1
    size = X.abs().mean(0).sqrt().numpy()

    def cut(M):
        U, S, Vt = np.linalg.svd(M, full_matrices=False)
        return (U[:, :r] * S[:r]) @ Vt[:r]

    root = d.sqrt().numpy()[:, None]
    wanted = {
        "svd": cut(W.numpy()), "asvd": cut(W.numpy() * size) / size, "fwsvd": cut(root * W.numpy()) / root,
    }  # fmt: skip
    for how, product in wanted.items():
        low = solve(W, moments, how, rank=r, fisher=d)
        np.testing.assert_allclose((low.B @ low.A).numpy(), product, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_centred_is_the_principal_components_of_the_outputs_and_never_worse_on_the_data(shape):
    W, X, moments = data(*shape, shift=2.0)
    bias = torch.randn(shape[0], dtype=torch.float64)
    low, plain = solve(W, moments, rank=4, center=True), solve(W, moments, rank=4)
    Y = X @ W.T + bias
    mean = Y.mean(0)
    U, S, Vt = torch.linalg.svd(Y - mean, full_matrices=False)
    wanted = (U[:, :4] * S[:4]) @ Vt[:4] + mean
    made = X @ (low.B @ low.A).T + low.bias(W, bias)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-9)
    assert output_error(W, X, low) <= output_error(W, X, plain) + 1e-12
    assert float(low.errors[4]) == pytest.approx(output_error(W, X, low), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_span_little_cost_nothing_and_leave_ranks_to_the_weight(shape):
    W, X, _ = data(*shape)
    X = X[:5]  # a singular second moment of rank 5
    moments = Moments(shape[1])
    moments.add(X)
    low = solve(W, moments)
    assert float(low.errors[5]) < 1e-12
    assert float((low.B @ low.A - W).norm() / W.norm()) < 1e-9
    six = low.first(6)
    left = W - low.first(5).B @ low.first(5).A
    assert float((W - six.B @ six.A).norm()) == pytest.approx(
        float(np.linalg.norm(np.linalg.svd(left.numpy(), compute_uv=False)[1:])), rel=1e-6
    )
    assert "added to its diagonal" in solve(W, moments, "svd-llm", rank=3).note


def test_split_shares_the_size_and_keeps_the_product():
    W, _, moments = data(12, 20)
    low = solve(W, moments, rank=5)
    even = low.split("sqrt")
    torch.testing.assert_close(even.B @ even.A, low.B @ low.A, rtol=0, atol=1e-12)
    torch.testing.assert_close(even.B.norm(dim=0), even.A.norm(dim=1))
    torch.testing.assert_close(low.B.T @ low.B, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_moments_do_not_depend_on_the_batches():
    _, X, whole = data(12, 20)
    parts = Moments(20)
    for piece in X.split([1, 49, 150]):
        parts.add(piece)
    torch.testing.assert_close(parts.second, whole.second, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(whole.second.numpy(), (X.T @ X / len(X)).numpy(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.root @ parts.root.T, parts.second, rtol=0, atol=1e-12)


def test_bad_options_are_named():
    W, _, moments = data(12, 20)
    for options, says in (
        ({"how": "svdllm"}, "Did you mean 'svd-llm'"),
        ({"how": "svd", "center": True}, "Only 'lord'"),
        ({"rank": 13}, "between 1 and 12"),
        ({"how": "fwsvd"}, "fisher="),
    ):
        with pytest.raises(AddendaError, match=says):
            solve(W, moments, **options)
    with pytest.raises(AddendaError, match="width 20"):
        solve(W, Moments(20))


def test_wide_inputs_are_summed_in_parts_and_give_one_symmetric_moment():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(50, 1101, generator=g)
    moments = Moments(1101)
    for part in X.split(7):
        moments.add(part)
    wanted = X.double().T @ X.double() / 50
    torch.testing.assert_close(moments.second, wanted, rtol=0, atol=1e-12)
    assert torch.equal(moments.second, moments.second.T)
