"""Core Space and KnOTS: exact coordinates of low-rank changes, against decompositions of the whole matrices."""

import pytest
import torch
from torch import Tensor

from addenda.combining.spaces import Low, core, evenly, knots, norm, total, triplets

RANKS = (3, 1, 2)


def several(m: int = 12, n: int = 15, ranks=RANKS) -> list[Low]:
    g = torch.Generator().manual_seed(0)
    return [Low(torch.randn(m, r, generator=g).double(), torch.randn(r, n, generator=g).double()) for r in ranks]


def orthonormal(M: Tensor) -> bool:
    return torch.allclose(M.T @ M, torch.eye(M.shape[1]).double(), atol=1e-12)


@pytest.mark.parametrize("space", [core, knots])
@pytest.mark.parametrize("m", [12, 4])
def test_nothing_is_lost(space, m):
    changes = several(m)
    made = space(changes)
    assert orthonormal(made.left) and made.left.shape[1] == min(m, sum(RANKS))
    for change, part in zip(changes, made.parts, strict=True):
        torch.testing.assert_close(made.back(part).dense(), change.dense())


def test_core_space_is_that_of_the_paper_for_even_factors():
    changes = several()
    made = core(changes)
    even = []
    for c in changes:
        U, S, Vt = torch.linalg.svd(c.dense())
        r = c.rank
        even.append((U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vt[:r]))
    left = torch.linalg.svd(torch.cat([b for b, _ in even], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([a for _, a in even]), full_matrices=False)[2]
    for c, part in zip(changes, made.parts, strict=True):
        torch.testing.assert_close((left.T @ c.dense() @ right.T).abs(), part.abs())  # but for signs


def test_core_space_does_not_depend_on_how_a_change_is_split():
    changes = several()
    other = [Low(c.B * 100, c.A / 100) if i == 1 else c for i, c in enumerate(changes)]
    for a, b in zip(core(changes).parts, core(other).parts, strict=True):
        torch.testing.assert_close(a.abs(), b.abs())


def test_knots_is_the_decomposition_of_all_side_by_side():
    changes = several()
    made = knots(changes)
    U, S, Vt = torch.linalg.svd(torch.cat([c.dense() for c in changes], 1), full_matrices=False)
    k = made.left.shape[1]
    torch.testing.assert_close((made.left.T @ U[:, :k]).abs(), torch.eye(k).double())
    for part, whole in zip(made.parts, (S[:k, None] * Vt[:k]).split(15, 1), strict=True):
        torch.testing.assert_close(part.abs(), whole.abs())


def test_total_evenly_and_norm():
    changes, weights = several(), [0.5, -2.0, 1.0]
    whole = sum(w * c.dense() for w, c in zip(weights, changes, strict=True))
    summed = total(changes, weights)
    torch.testing.assert_close(summed.dense(), whole)
    assert summed.rank == 6 and norm(summed) == pytest.approx(float(whole.norm()), rel=1e-12)
    U, S, Vt = torch.linalg.svd(whole, full_matrices=False)
    even = evenly(summed)
    torch.testing.assert_close(even.dense(), whole)
    torch.testing.assert_close(even.B.norm(dim=0), even.A.norm(dim=1))
    torch.testing.assert_close(evenly(summed, 2).dense(), U[:, :2] * S[:2] @ Vt[:2])
    share = float(S[:3].square().sum() / S.square().sum())
    assert evenly(summed, energy=share).rank == 3 and evenly(summed, energy=share + 1e-6).rank == 4


def test_what_adds_to_nothing_has_a_rank_of_one_and_no_size():
    c = several()[0]
    nothing = total([c, c], [1.0, -1.0])
    assert norm(nothing) < 1e-12 and evenly(total([c, c], [0.5, 0.5])).rank == c.rank
    assert triplets(Low(torch.zeros(4, 2).double(), torch.zeros(2, 3).double()))[1].tolist() == [0.0]
    assert norm(Low(torch.zeros(4, 0).double(), torch.zeros(0, 3).double())) == 0
