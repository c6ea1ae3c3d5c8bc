"""Each rule against its definition entry by entry, and which of them turn with their matrices."""

import math

import pytest
import torch
from torch import Tensor

from addenda.combining.rules import RULES, Settings, elected, polar, trimmed, within
from addenda.combining.spaces import Low, core
from addenda.core.base.random import Stream

WEIGHTS = [0.7, -0.4, 1.2]


def three(m: int = 6, n: int = 9, rank: int | None = None) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    if rank is None:
        return [torch.randn(m, n, generator=g).double() for _ in range(3)]
    return [torch.randn(m, rank, generator=g).double() @ torch.randn(rank, n, generator=g).double() for _ in range(3)]


def apply(name: str, parts: list[Tensor], weights: list[float], **settings) -> Tensor:
    chosen = Settings(**({"density": RULES[name].density or 1.0} | settings))
    return RULES[name](parts, weights, chosen, Stream(3, name))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_trimmed_keeps_the_largest_entries(density):
    D = three()[0]
    kept = trimmed(D, density)
    count = round(density * D.numel())
    assert int((kept != 0).sum()) == count and torch.equal(kept[kept != 0], D[kept != 0])
    assert count == D.numel() or D[kept == 0].abs().max() <= kept[kept != 0].abs().min()
    assert int((trimmed(D, 1e-9) != 0).sum()) == 1, "one at least"


def test_ties_is_its_definition_entry_by_entry():
    parts = three()
    found = apply("ties", parts, WEIGHTS, density=0.4, scale=2.0)
    cut = [trimmed(D, 0.4) for D in parts]
    for i in range(6):
        for j in range(9):
            moves = [(w * float(D[i, j]), abs(w)) for w, D in zip(WEIGHTS, cut, strict=True)]
            sign = math.copysign(1, sum(m for m, _ in moves)) if sum(m for m, _ in moves) else 0
            agree = [(m, w) for m, w in moves if m * sign > 0]
            wanted = 2 * sum(m for m, _ in agree) / sum(w for _, w in agree) if agree else 0.0
            assert float(found[i, j]) == pytest.approx(wanted, abs=1e-14)
    assert int((found == 0).sum()) > 0


def test_ties_and_magnitude_are_peft_s_where_weights_are_one():
    theirs = pytest.importorskip("peft.utils.merge_utils")
    parts, ones = three(), torch.ones(3).double()
    torch.testing.assert_close(apply("ties", parts, [1.0] * 3, density=0.5), theirs.ties(parts, ones, 0.5))
    weights = torch.tensor(WEIGHTS).double()
    found = apply("magnitude", parts, WEIGHTS, density=0.5)
    torch.testing.assert_close(found, theirs.magnitude_prune(parts, weights, 0.5))
    assert float((apply("ties", parts, WEIGHTS) - theirs.ties(parts, weights, 0.2)).norm()) > 0.1, (
        "theirs elects unweighted"
    )


def test_with_weights_of_one_ties_divides_by_the_count_of_those_that_agree():
    a, b, c = torch.tensor([[2.0]]), torch.tensor([[4.0]]), torch.tensor([[-1.0]])
    assert float(elected([a, b, c], [1.0, 1.0, 1.0])) == 3.0
    assert float(elected([a, -a], [1.0, 1.0])) == 0.0, "no sign was elected"


def test_dare_drops_a_share_and_keeps_the_mean():
    D = torch.ones(300, 200, dtype=torch.float64)
    found = apply("dare", [D], [1.0], density=0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    both = apply("dare", [D, D], [1.0, 1.0], density=0.25)
    assert 8.0 in both.unique() and 4.0 in both.unique(), "each has drops of its own"
    assert torch.equal(found, apply("dare", [D], [1.0], density=0.25)), "a seed and a path decide them"
    assert torch.equal(apply("dare", [D], [1.0], density=1.0), D)


def test_della_keeps_large_entries_rather_than_small_ones_and_the_mean():
    D = torch.arange(1.0, 1001.0).double().repeat(200, 1)
    found = apply("della", [D], [1.0], density=0.5, window=0.8)
    kept = (found != 0).double().mean(0)
    assert float(kept[:100].mean()) == pytest.approx(0.14, abs=0.02)
    assert float(kept[-100:].mean()) == pytest.approx(0.86, abs=0.02)
    assert float(found.mean() / D.mean()) == pytest.approx(1.0, abs=0.02), "what stays is divided by its probability"
    torch.testing.assert_close(found[found != 0] * (0.1 + 0.8 * (D[found != 0] - 1) / 999), D[found != 0])


def test_polar_is_the_nearest_orthonormal_one_and_bears_doubled_columns():
    U = three()[0][:, :3]
    near = polar(U)
    torch.testing.assert_close(near.T @ near, torch.eye(3, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(U.T @ U)
    torch.testing.assert_close(near, U @ (vectors * values.rsqrt()) @ vectors.T)
    Q = torch.linalg.qr(U).Q
    torch.testing.assert_close(polar(torch.cat([Q, Q], 1)), torch.cat([Q, Q], 1) / 2**0.5)


def test_tsv_of_orthogonal_changes_is_their_sum_and_of_others_is_not():
    g = torch.Generator().manual_seed(1)
    Q, P = (torch.linalg.qr(torch.randn(k, k, generator=g).double()).Q for k in (8, 10))
    apart = [Q[:, i : i + 2] * torch.tensor([2.0, 1.0]).double() @ P[i : i + 2] for i in (0, 2)]
    torch.testing.assert_close(apply("tsv", apart, [1.0, 0.5]), apart[0] + 0.5 * apart[1])
    crossed = three(8, 10, 2)[:2]
    found = apply("tsv", crossed, [1.0, 1.0])
    assert float((found - sum(crossed)).norm() / sum(crossed).norm()) > 0.01
    # by its own words: U (UᵀU)^−½ of all left vectors side by side, and so on the right
    lefts, sizes, rights = zip(*(torch.linalg.svd(D, full_matrices=False) for D in crossed), strict=True)
    U, V = torch.cat([L[:, :2] for L in lefts], 1), torch.cat([R[:2] for R in rights]).T
    whiten = [M @ torch.linalg.inv(torch.linalg.cholesky(M.T @ M)).T for M in (U, V)]
    assert all(torch.allclose(w.T @ w, torch.eye(4).double()) for w in whiten), "a basis of the same span"
    root = [M @ torch.linalg.inv(_root(M.T @ M)) for M in (U, V)]
    torch.testing.assert_close(found, root[0] @ torch.diag(torch.cat([s[:2] for s in sizes])) @ root[1].T)


def _root(G: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(G)
    return vectors * values.sqrt() @ vectors.T


def test_iso_c_makes_one_singular_value_of_all():
    found = apply("iso-c", three(rank=2)[:1], [1.0])
    values = torch.linalg.svdvals(found)
    before = torch.linalg.svdvals(three(rank=2)[0])[:2]
    torch.testing.assert_close(values[:2], before.mean().repeat(2))
    assert float(values[2:].max()) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_the_rules_that_turn_are_those_that_say_so(name):
    parts = three(7, 8, 2)
    g = torch.Generator().manual_seed(2)
    Q, R = (torch.linalg.qr(torch.randn(k, k, generator=g).double()).Q for k in (7, 8))
    here = apply(name, parts, WEIGHTS)
    there = apply(name, [Q @ D @ R for D in parts], WEIGHTS)
    apart = float((Q @ here @ R - there).norm() / here.norm())
    assert apart < 1e-9 if RULES[name].turns else apart > 0.05


@pytest.mark.parametrize("name", [r.name for r in RULES.values() if r.turns])
def test_in_core_space_such_a_rule_is_the_same_as_on_the_weight(name):
    g = torch.Generator().manual_seed(4)
    low = [Low(torch.randn(12, r, generator=g).double(), torch.randn(r, 15, generator=g).double()) for r in (3, 1, 2)]
    space = core(low)
    assert {p.shape for p in space.parts} == {(6, 6)}
    settings = within(Settings(), (12, 15))
    back = space.back(RULES[name](space.parts, WEIGHTS, settings, Stream(0)))
    torch.testing.assert_close(back.dense(), RULES[name]([c.dense() for c in low], WEIGHTS, settings, Stream(0)))


@pytest.mark.parametrize("name", RULES)
def test_one_change_is_itself_and_halves_of_it_are(name):
    D = three()[0]
    lossless = {"density": 1.0} if RULES[name].density else {}
    if name in ("iso-c", "della"):
        assert apply(name, [D], [1.0]).isfinite().all()
        return
    torch.testing.assert_close(apply(name, [D], [1.0], **lossless), D)
    if name == "tsv":  # of each its first min(m, n) / 2 triplets, and equal directions are one
        D = three(rank=2)[0]
        torch.testing.assert_close(apply(name, [D, D], [1.0, 1.0]), D)
    else:
        torch.testing.assert_close(apply(name, [D, D], [0.5, 0.5], **lossless), D)


@pytest.mark.parametrize("name", RULES)
def test_vectors_and_zeros(name):
    v = torch.arange(1.0, 6.0).double()
    assert apply(name, [v, v], [1.0, 1.0]).shape == v.shape
    zero = torch.zeros(3, 4).double()
    assert not bool(apply(name, [zero, zero], [1.0, 1.0]).any())
