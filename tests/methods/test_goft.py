"""GOFT against products of Givens matrices of the paper's equations (1) to (3), and what one angle an input can do."""

import pytest
import torch

from addenda.methods.goft import GOFT


def rotation(G, n):
    """P_L … P_1 from 2 × 2 matrices in the order of the stages; axes without a partner wait."""
    R, left, step, values = torch.eye(n, dtype=G.dtype), n, 1, iter(G)
    while left > 1:
        for k in range(left // 2):
            i, j, g = 2 * step * k, step * (2 * k + 1), next(values)
            P = torch.eye(n, dtype=G.dtype)
            P[i, i], P[i, j], P[j, i], P[j, j] = g.flatten()
            R = P @ R
        left, step = left - left // 2, 2 * step
    return R


def givens(angle):
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)


@pytest.mark.parametrize("quasi", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (5, 16), (9, 7), (3, 21), (4, 2)])
def test_reference(check, shape, quasi):
    at = check.make(GOFT(quasi=quasi), *shape)
    leaf = at.leaves[0].detach().clone().requires_grad_()
    R = rotation(leaf + torch.eye(2) if quasi else givens(leaf), shape[1])
    new = at.W @ R.T
    torch.testing.assert_close((at.W + at.delta).detach(), new.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    (want,) = torch.autograd.grad((check.upstream(at)[1] * new).sum(), leaf)
    for through in ("delta", "apply"):
        got = check.gradients(at, through)[at.trainable[0]]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_planes_are_the_papers():
    """P_r turns the axes 2^r k and 2^(r−1) (2k + 1)."""
    n, at, planes = 8, 0, []
    for r in (1, 2, 3):
        planes += [(2**r * k, 2 ** (r - 1) * (2 * k + 1)) for k in range(n // 2**r)]
    for i, j in planes:
        angle = torch.zeros(n - 1, dtype=torch.float64).index_fill(0, torch.tensor([at]), 0.3)
        R = GOFT().effective(torch.eye(n, dtype=torch.float64), {"angle": angle}).T
        moved = (R - torch.eye(n, dtype=torch.float64)).nonzero().unique().tolist()
        assert moved == [i, j]
        torch.testing.assert_close(R[j, i], torch.tensor(0.3, dtype=torch.float64).sin())
        at += 1
    assert at == n - 1


@pytest.mark.parametrize("n", [8, 13])
def test_the_angles_turn_any_one_row_into_an_axis(n):
    """The paper's theorem 4.1: from the leaves of the tree to its root, every angle clears the second of its pair."""
    row = torch.randn(n, dtype=torch.float64)
    angles, left = [], row
    while len(left) > 1:
        pairs, alone = left[: len(left) // 2 * 2].view(-1, 2), left[len(left) // 2 * 2 :]
        angles.append(-torch.atan2(pairs[:, 1], pairs[:, 0]))
        left = torch.cat([pairs.norm(dim=1), alone])
    new = GOFT().effective(row[None], {"angle": torch.cat(angles)})[0]
    torch.testing.assert_close(new, row.norm() * torch.eye(n, dtype=torch.float64)[0])


def test_angles_norms_and_spectrum_stay(check):
    at = check.make(GOFT(), 9, 13)
    new = (at.W + at.delta).detach()
    torch.testing.assert_close(new @ new.T, at.W @ at.W.T)
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(at.W))
    assert (new - at.W).norm() > 0.1 * at.W.norm()
    free = check.make(GOFT(quasi=True), 9, 13)
    assert (torch.linalg.svdvals(free.W + free.delta) - torch.linalg.svdvals(free.W)).norm() > 0.1


def test_start_and_counts(check):
    for quasi in (False, True):
        check.starts_exactly(GOFT(quasi=quasi))
        check.starts_exactly(GOFT(quasi=quasi), 50, 70)
        check.counts(GOFT(quasi=quasi))
    assert GOFT().trainable(64, 96) == 95
    assert GOFT(quasi=True).trainable(64, 96) == 380
    assert "no plane" in GOFT().check(5, 1)
