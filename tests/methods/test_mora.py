"""MoRA against its operators written as matrices."""

import math

import pytest
import torch

from addenda import AddendaError
from addenda.methods.mora import MoRA


def turn(g, r):
    """The r × r matrix that turns the pair (i, i + r/2) by g · 10000^(−2i/r)."""
    R = torch.zeros(r, r, dtype=torch.float64)
    for i in range(r // 2):
        angle, j = g * 10000 ** (-2 * i / r), i + r // 2
        R[i, i] = R[j, j] = math.cos(angle)
        R[j, i], R[i, j] = math.sin(angle), -math.sin(angle)
    return R


def dense(M, m, n, form):
    """up M down as an m × n matrix, differentiable in M."""
    r, groups = len(M), -(-n // len(M))
    fill = torch.zeros(groups * r, n, dtype=torch.float64)  # the input, filled up with its first entries
    for i in range(groups * r):
        fill[i, i % n] = 1
    if form == "sharing":
        rows = M @ sum(fill[g * r : (g + 1) * r] for g in range(groups))
    else:
        rows = torch.cat([M @ turn(g, r) @ fill[g * r : (g + 1) * r] for g in range(groups)])
    return torch.stack([rows[i % len(rows)] for i in range(m)])


@pytest.mark.parametrize("form", ["sharing", "rotation"])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17), (30, 7), (2, 40)])
def test_reference(check, shape, form):
    at = check.make(MoRA(rank=1, form=form), *shape)
    M = at.p["M"].detach().clone().requires_grad_()
    want = dense(M, *shape, form)
    torch.testing.assert_close(at.delta.detach(), want.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    (expected,) = torch.autograd.grad((check.upstream(at)[1] * want).sum(), M)
    for through in ("delta", "apply"):
        torch.testing.assert_close(check.gradients(at, through)["M"], expected, rtol=1e-9, atol=1e-9)


def test_higher_rank_than_a_lora_of_as_many_numbers(check):
    for form in ("sharing", "rotation"):
        at = check.make(MoRA(rank=2, form=form), 36, 36)
        assert at.method.trainable(36, 36) == 12**2 == 2 * (36 + 36)
        rank = torch.linalg.matrix_rank(at.delta.detach())
        assert rank == (12 if form == "sharing" else 36)


def test_start_and_counts(check):
    for form in ("sharing", "rotation"):
        check.starts_exactly(MoRA(form=form))
        check.starts_exactly(MoRA(rank=3, form=form), 50, 70)
        check.counts(MoRA(rank=4, form=form))
    assert MoRA(rank=8, form="sharing")._side(1024, 1024) == 128
    assert MoRA(rank=3, form="sharing")._side(50, 70) == 18 == MoRA(rank=3)._side(50, 70)
    assert MoRA(rank=8)._side(3, 1000) == 2  # at most the narrower side, and even


def test_options_and_shapes_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"form": "x"}, "form must be")):
        with pytest.raises(AddendaError, match=message):
            MoRA(**options)
    assert "has none" in MoRA().check(1, 20)
    assert MoRA(form="sharing").check(1, 20) is None
