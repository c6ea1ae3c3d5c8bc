"""SVFT against Σ m_ij u_i v_jᵀ summed term by term over a pattern written as a set of pairs."""

import pytest
import torch

from addenda import AddendaError
from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.methods.svft import SVFT

ALL = [{"pattern": "plain"}, {"pattern": "banded", "band": 2}, {"pattern": "random", "band": 2}]
ALL += [{**o, "full_matrices": True} for o in ALL[1:]] + [{**ALL[1], "released": True}]


def pairs(method: SVFT, at) -> list[tuple[int, int]]:
    """Ω, in the order of the values."""
    rows, columns = at.p["U"].shape[1], at.p["Vt"].shape[0]
    if method.pattern in ("plain", "banded"):
        band = 0 if method.pattern == "plain" else method.band
        return [(i, j) for i in range(rows) for j in range(columns) if abs(i - j) <= band]
    return [divmod(int(f), columns) for f in at.p["index"]]


@pytest.mark.parametrize("options", [*ALL, {"pattern": "topk", "band": 1}], ids=str)
@pytest.mark.parametrize("shape", [(9, 9), (12, 7), (7, 12)])
def test_reference(check, shape, options):
    method = SVFT(**options)
    if options["pattern"] == "topk" and shape[0] != shape[1]:
        assert "square" in method.check(*shape)
        return
    at = check.make(method, *shape)
    U, Vt, values = at.p["U"], at.p["Vt"], at.p["values"].detach()
    omega = pairs(method, at)
    assert len(set(omega)) == len(values)
    half = torch.sigmoid(at.p["gate"].detach()) if method.released else 1.0
    want = sum(half * v * torch.outer(U[:, i], Vt[j]) for v, (i, j) in zip(values, omega, strict=True))
    torch.testing.assert_close(at.delta.detach(), want, rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(want) <= min(len(values), *shape)
    check.forms_agree(at)

    G = check.upstream(at)[1]
    projected = U.T @ G @ Vt.T  # ∂L/∂m_ij = (Uᵀ G V)_ij
    expected = half * torch.stack([projected[i, j] for i, j in omega])
    for through in ("delta", "apply"):
        got = check.gradients(at, through)["values"]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 9), (12, 7), (7, 12)])
@pytest.mark.parametrize("full", [False, True])
def test_the_basis_is_the_weights_own(shape, full):
    W = torch.randn(*shape)
    U, _, Vt = singular_triplets(W, full_matrices=full)
    k, wide = min(shape), W.double()
    assert U.dtype == torch.float64
    assert (U.shape[1], Vt.shape[0]) == (shape if full else (k, k))
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64))
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(len(Vt), dtype=torch.float64))
    sigma = torch.linalg.svdvals(wide)
    torch.testing.assert_close((U[:, :k] * sigma) @ Vt[:k], wide)
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())
    again = singular_triplets(-W, full_matrices=full)[0]  # only v_i turns: the signs hang on u_i alone
    torch.testing.assert_close(again[:, :k], U[:, :k])


def test_ill_weights_have_a_basis():
    for W in (torch.zeros(6, 4), torch.ones(4, 6), torch.eye(5)):
        for t in singular_triplets(W):
            assert bool(t.isfinite().all())


@pytest.mark.parametrize("band", [0, 2, 16, 100])
def test_budgets_follow_the_band(check, band):
    k = 50
    clipped = min(band, k - 1)
    want = k * (2 * clipped + 1) - clipped * (clipped + 1)
    for pattern in ("banded", "random"):
        assert SVFT(pattern=pattern, band=band).trainable(50, 70) == want
        check.counts(SVFT(pattern=pattern, band=band))
    check.counts(SVFT(pattern="topk", band=min(band, 16)), [(64, 64)])
    assert SVFT().trainable(50, 70) == k
    assert SVFT(released=True).trainable(50, 70) == k + 1
    if band < k:
        check.counts(SVFT(pattern="banded", band=band, full_matrices=True))


def test_published_counts():
    """Paper, table 1: Gemma-2B, 0.19 M plain and 6.35 M at d = 16 (deltas.md §4.2)."""
    sites = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (16384, 2048), (16384, 2048), (2048, 16384)]
    assert 18 * sum(SVFT().trainable(*s) for s in sites) == 193_536
    assert 18 * sum(SVFT(pattern="random", band=16).trainable(*s) for s in sites) == 6_352_416


def test_plain_turns_no_singular_vector(check):
    at = check.make(SVFT(), 12, 7)
    new = at.W + at.delta.detach()
    spectrum = at.p["U"].T @ new @ at.p["Vt"].T
    torch.testing.assert_close(spectrum, torch.diag(spectrum.diagonal()))


def test_topk_takes_the_best_aligned_pairs(check):
    at = check.make(SVFT(pattern="topk", band=1), 9, 9)
    score = (at.p["U"].T @ at.p["Vt"].T).abs()
    chosen = torch.zeros(81, dtype=torch.bool).index_fill(0, at.p["index"].long(), True)
    assert score.flatten()[chosen].min() > score.flatten()[~chosen].max()


def test_random_patterns_differ_between_sites_and_repeat():
    W, method = torch.randn(20, 20), SVFT(pattern="random", band=1)
    first, second, again = (method.derive(W, Stream(0, path))["index"] for path in ("a", "b", "a"))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("shape", [(9, 9), (12, 7)])
def test_repeats_sum_what_falls_on_one_place(check, shape, released):
    """The release: rows and columns of randint, and a sparse matrix that adds up what it is given twice."""
    method = SVFT(pattern="random", band=2, repeats=True, released=released)
    at = check.make(method, *shape)
    U, Vt, values = at.p["U"], at.p["Vt"], at.p["values"].detach()
    k = min(shape)
    omega = [divmod(int(at.p["index"][c]), k) for c in at.p["of"]]  # one a value
    assert len(omega) == len(values) == k * 5 - 2 * 3
    assert len(set(omega)) < len(omega) == len(at.p["index"].unique())  # entries that nothing is drawn for stay zero
    half = torch.sigmoid(at.p["gate"].detach()) if released else 1.0
    M = torch.zeros(k, k, dtype=torch.float64)
    for v, (i, j) in zip(values, omega, strict=True):
        M[i, j] += half * v
    torch.testing.assert_close(at.delta.detach(), U @ M @ Vt, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    projected = U.T @ check.upstream(at)[1] @ Vt.T
    want = half * torch.stack([projected[i, j] for i, j in omega])
    for through in ("delta", "apply"):
        torch.testing.assert_close(check.gradients(at, through)["values"], want, rtol=1e-9, atol=1e-9)


def test_repeats_draw_every_place_alike_and_count_as_without(check):
    method = SVFT(pattern="random", band=16, repeats=True)
    assert method.trainable(50, 70) == SVFT(pattern="random", band=16).trainable(50, 70)
    check.counts(method)
    check.starts_exactly(method)
    p = method.derive(torch.randn(200, 200), Stream(0, "site"))
    n, N = len(p["of"]), 200 * 200
    assert abs(len(p["of"].unique()) / (N * (1 - (1 - 1 / N) ** n)) - 1) < 0.02  # distinct ones among n draws of N
    assert len(p["index"].unique()) == n
    times = p["index"].long()[p["of"].long()].double()
    assert abs(times.mean() / (N - 1) - 0.5) < 0.015


def test_start(check):
    for method in (SVFT(), SVFT(pattern="banded", band=3), SVFT(pattern="random"), SVFT(pattern="topk")):
        check.starts_exactly(method)
    check.starts_exactly(SVFT(pattern="banded", full_matrices=True), 50, 70)


def test_the_released_start_is_declared_and_moves_the_weight():
    method = SVFT(pattern="banded", released=True)
    assert SVFT().start.bound == 0 < method.start.bound
    W = torch.randn(96, 64)
    p = method.derive(W, Stream(0, "site"))
    p |= method.init(W, Stream(0, "site"), p)
    assert abs(method.delta(W, p).norm().item() - 0.5**0.5) < 0.03


def test_options_are_checked():
    with pytest.raises(AddendaError, match="never touches"):
        SVFT(full_matrices=True)
    with pytest.raises(AddendaError, match="band must be at least 0"):
        SVFT(pattern="banded", band=-1)
    with pytest.raises(AddendaError, match="draws of pattern='random'"):
        SVFT(pattern="banded", repeats=True)
