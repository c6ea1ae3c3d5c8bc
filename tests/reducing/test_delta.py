"""The forms of a change against dense algebra: numpy's SVD, sorted entries and enumeration, in float64."""

import numpy as np
import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.reducing.delta import difference, few_bits, low_rank, top_k

SHAPES = [(12, 20), (20, 12), (15, 15)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def falling(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall by a factor of 1e4."""
    k = min(m, n)
    U, V = torch.linalg.qr(drawn(m, k, seed=seed)).Q, torch.linalg.qr(drawn(n, k, seed=seed + 1)).Q
    return (U * torch.logspace(0, -4, k, dtype=torch.float64)) @ V.T


def moment(n: int, rows: int = 60, seed: int = 5) -> torch.Tensor:
    X = drawn(rows, n, seed=seed) @ (drawn(n, n, seed=seed + 1) * torch.logspace(0, -1.5, n, dtype=torch.float64))
    return X.T @ X / rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_error_of_a_rank_is_the_tail_of_the_singular_values(shape, rank):
    D = falling(*shape)
    values = np.linalg.svd(D.numpy(), compute_uv=False) ** 2
    tail = float(values[rank:].sum() / values.sum())
    thin = low_rank(D, rank=rank)
    assert thin.B.shape == (shape[0], rank) and thin.A.shape == (rank, shape[1]) and thin.rank == rank
    assert thin.error == pytest.approx(tail**0.5, rel=1e-5)
    assert thin.energy == pytest.approx(1 - tail, abs=1e-12)
    assert float((D - thin.dense()).norm() / D.norm()) == pytest.approx(thin.error, rel=1e-6)
    torch.testing.assert_close(thin.B.norm(dim=0), thin.A.norm(dim=1))  # split evenly


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 7])
def test_weighed_by_inputs_it_is_the_best_output_of_its_rank(shape, rank):
    D, X = drawn(*shape), drawn(50, shape[1], seed=9) @ torch.diag(torch.logspace(0, -2, shape[1], dtype=torch.float64))
    thin, plain = low_rank(D, rank=rank, second=X.T @ X / 50), low_rank(D, rank=rank)
    tail = np.linalg.svd((X @ D.T).numpy(), compute_uv=False) ** 2  # Eckart and Young, on the outputs themselves
    best = float(tail[rank:].sum() / tail.sum())
    of_plain = float(((X @ (D - plain.dense()).T) ** 2).sum() / tail.sum())
    assert 1 - thin.energy == pytest.approx(best, rel=1e-8)
    assert best < 0.9 * of_plain and plain.error < thin.error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("second", [None, "full", "diagonal"])
def test_a_known_product_is_solved_in_its_core_with_the_same_answer(shape, second):
    m, n = shape
    B, A = drawn(m, 6), drawn(6, n, seed=1)
    C = {None: None, "full": moment(n), "diagonal": moment(n).diagonal()}[second]
    core, dense = low_rank((B, A), rank=4, second=C), low_rank(B @ A, rank=4, second=C)
    torch.testing.assert_close(core.dense(), dense.dense(), rtol=0, atol=1e-9)
    assert (core.error, core.energy) == pytest.approx((dense.error, dense.energy), rel=1e-8)
    whole = low_rank((B, A), rank=10, second=C)
    assert whole.rank == 6 and whole.error < 1e-12
    wide = low_rank((drawn(m, 30), drawn(30, n, seed=1)), rank=3, second=C)  # an inner size above both others
    torch.testing.assert_close(
        wide.dense(), low_rank(drawn(m, 30) @ drawn(30, n, seed=1), rank=3, second=C).dense(), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighed", [False, True])
def test_energy_is_the_lowest_rank_that_keeps_the_share(shape, weighed):
    D, C = falling(*shape), moment(shape[1]) if weighed else None
    root = np.linalg.cholesky(C.numpy()) if C is not None else np.eye(shape[1])
    values = np.linalg.svd(D.numpy() @ root, compute_uv=False) ** 2
    for share in (0.5, 0.9, 0.999):
        wanted = int(np.searchsorted(np.cumsum(values) / values.sum(), share) + 1)
        thin = low_rank(D, energy=share, second=C)
        assert thin.rank == wanted and thin.energy >= share
    exact = low_rank(falling(*shape)[:, :] if C is None else D)
    assert exact.error <= 1e-6 and exact.rank == min(shape)
    assert low_rank(drawn(shape[0], 3) @ drawn(3, shape[1], seed=2)).rank == 3  # neither: what gives it back


def test_ranks_that_inputs_do_not_use_go_to_what_is_left():
    D, X = drawn(9, 14), drawn(4, 14, seed=3)
    C = X.T @ X / 4
    thin = low_rank(D, rank=6, second=C)
    assert 1 - thin.energy < 1e-12  # 4 directions are all that inputs span
    four = low_rank(D, rank=4, second=C)
    left = torch.linalg.svdvals(D - four.dense())
    assert thin.rank == 6
    assert thin.error == pytest.approx(float(left[2:].square().sum().sqrt() / D.norm()), rel=1e-6)
    assert low_rank(D, rank=9, second=C).error < 1e-9 and low_rank(D, second=torch.zeros(14)).energy == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighed", [False, True])
def test_lower_ranks_are_the_first_columns_and_rows_of_higher_ones(shape, weighed):
    D, C = falling(*shape), moment(shape[1]) if weighed else None
    high, low = low_rank(D, rank=9, second=C), low_rank(D, rank=4, second=C)
    torch.testing.assert_close(high.B[:, :4] @ high.A[:4], low.dense(), rtol=0, atol=1e-9)


def test_a_stack_has_one_rank_and_the_energy_of_all_its_matrices():
    D = torch.stack([falling(8, 10), 3 * drawn(8, 10), torch.zeros(8, 10, dtype=torch.float64)])
    thin = low_rank(D, rank=3)
    for i, one in enumerate(D):
        torch.testing.assert_close(thin.dense()[i], low_rank(one, rank=3).dense(), rtol=0, atol=1e-9)
    assert thin.error == pytest.approx(float((D - thin.dense()).norm() / D.norm()), rel=1e-9)
    share = low_rank(D, energy=0.8)
    assert low_rank(D, rank=share.rank).energy >= 0.8 > low_rank(D, rank=share.rank - 1).energy
    factors = drawn(3, 8, 2), drawn(3, 2, 10, seed=1)
    assert low_rank(factors).rank == 2 and low_rank(factors).error < 1e-12
    C = torch.stack([moment(10, seed=s) for s in (1, 11, 21)])
    apart = low_rank(D, rank=2, second=C)
    torch.testing.assert_close(apart.dense()[1], low_rank(D[1], rank=2, second=C[1]).dense(), rtol=0, atol=1e-9)


def test_the_dtype_is_that_of_the_change_and_a_zero_change_is_rank_one():
    assert low_rank(drawn(4, 5).bfloat16(), rank=2).B.dtype == torch.float32
    assert low_rank(drawn(4, 5), rank=2).A.dtype == torch.float64
    zero = low_rank(torch.zeros(4, 5), rank=3)
    assert zero.rank == 1 and zero.error == 0 and zero.energy == 1 and not zero.dense().any()


def test_top_k_takes_the_largest_and_of_equal_ones_the_first():
    D = drawn(6, 7)
    sparse = top_k(D, count=9)
    order = sorted(range(42), key=lambda i: (-abs(float(D.flatten()[i])), i))[:9]
    assert sparse.index.tolist() == sorted(order) and sparse.count == 9
    torch.testing.assert_close(sparse.values, D.flatten()[sparse.index])
    assert sparse.error == pytest.approx(float((D - sparse.dense()).norm() / D.norm()))
    assert top_k(torch.ones(6, 7), count=4).index.tolist() == [0, 1, 2, 3]
    assert top_k(D, density=0.1).count == 4 and top_k(D, density=1e-9).count == 1
    assert top_k(D, density=1.0).error == 0


def test_top_k_weighed_keeps_more_of_the_outputs_of_independent_inputs():
    D, scale = drawn(6, 8), torch.logspace(0, -3, 8, dtype=torch.float64)
    sparse = top_k(D, count=10, second=torch.diag(scale))
    energy = D.square() * scale
    best = float(energy.flatten().sort(descending=True).values[:10].sum() / energy.sum())
    assert sparse.energy == pytest.approx(best, rel=1e-12)
    plain = top_k(D, count=10)
    assert float((plain.dense().square() * scale).sum() / energy.sum()) < best
    torch.testing.assert_close(top_k(D, count=10, second=scale).dense(), sparse.dense())


def test_a_stack_keeps_as_many_entries_in_each_matrix():
    D = torch.stack([drawn(3, 4), 100 * drawn(3, 4, seed=1)])
    sparse = top_k(D, count=5)
    assert sparse.index.shape == (2, 5) and sparse.dense().shape == D.shape
    for i in range(2):
        torch.testing.assert_close(sparse.dense()[i], top_k(D[i], count=5).dense())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_have_the_scale_and_mean_of_least_squares(bits):
    D = drawn(20, 30).float() ** 3  # far from normal
    coded = few_bits(D, bits)
    values = coded.dense()
    assert len(values.unique()) <= 2**bits and coded.codes.depth == bits
    x, y = values.double().flatten(), D.double().flatten()
    line = np.polyfit(x.numpy(), y.numpy(), 1)  # no other scale or mean of these codes does better
    assert line == pytest.approx([1, 0], abs=1e-5)
    assert coded.error == pytest.approx(float((D - values).norm() / D.norm()), rel=1e-6)
    assert few_bits(torch.full((3, 4), 2.5), bits).dense().flatten().tolist() == pytest.approx([2.5] * 12)


def test_one_bit_of_a_symmetric_change_is_its_mean_size_by_sign():
    D = drawn(8, 9)
    D = torch.cat([D, -D])  # mean 0
    torch.testing.assert_close(few_bits(D, 1).dense().double(), D.sign() * D.abs().mean(), rtol=1e-6, atol=0)


def test_each_matrix_of_a_stack_has_codes_of_its_own():
    D = torch.stack([drawn(5, 6).float(), 10 * drawn(5, 6, seed=1).float() + 3])
    values = few_bits(D, 3).dense()
    for i in range(2):
        torch.testing.assert_close(values[i], few_bits(D[i], 3).dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_difference_gives_the_tuned_bits_back(dtype):
    base = drawn(40, 50).to(dtype)
    tuned = base.clone()
    tuned.view(-1)[::7] += 1e-2  # some too small to change a number in this dtype
    tuned[3, 4], tuned[5, 6] = float("nan"), -0.0
    base[5, 6] = 0.0
    patch = difference(base, tuned)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    assert torch.equal(patch.onto(base).view(bits), tuned.view(bits))
    before, after = base.view(bits).flatten().tolist(), tuned.view(bits).flatten().tolist()
    wanted = [i for i in range(len(before)) if before[i] != after[i]]
    assert patch.index.tolist() == wanted and patch.values.dtype == dtype
    assert len(difference(base, base).index) == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda D: low_rank(D, rank=0), "between 1 and 4"),
        (lambda D: low_rank(D, rank=5), "between 1 and 4"),
        (lambda D: low_rank(D, rank=2, energy=0.5), "not both"),
        (lambda D: low_rank(D, energy=1.5), "energy must be"),
        (lambda D: low_rank(D, rank=2, second=torch.eye(4)), "width 5"),
        (lambda D: low_rank(D * float("nan"), rank=2), "not finite"),
        (lambda D: low_rank((D, D), rank=2), "m × s and s × n"),
        (lambda D: low_rank(D[0], rank=1), "matrix or a stack"),
        (lambda D: low_rank(D, rank=1, second=torch.full((5, 5), float("inf"))), "second moments hold"),
        (lambda D: top_k(D), "one of them"),
        (lambda D: top_k(D, count=1, density=0.1), "one of them"),
        (lambda D: top_k(D, count=21), "from 1 to 20"),
        (lambda D: top_k(D, density=0.0), "density must be"),
        (lambda D: few_bits(D, 9), "bits must be"),
        (lambda D: difference(D, D.T), "one shape and dtype"),
        (lambda D: difference(D, D.float()), "one shape and dtype"),
    ],
)
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(AddendaError, match=says):
        call(drawn(4, 5))
