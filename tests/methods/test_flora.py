"""FLoRA's two forms against the entries of W multiplied one by one."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.base.random import Stream
from addenda.methods.flora import FLoRA


def full(at):
    """The paper's factors: ours are offsets from one component of ones."""
    A, B = at.p["A"].detach().clone(), at.p["B"].detach().clone()
    A[0] += 1
    B[:, 0] += 1
    return A, B


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_reference(check, shape, rank):
    at = check.make(FLoRA(rank=rank), *shape)
    A, B = full(at)
    want = torch.stack([torch.stack([at.W[i, j] * (B[i] @ A[:, j]) for j in range(shape[1])]) for i in range(shape[0])])
    torch.testing.assert_close(at.W + at.delta.detach(), want, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    passes = sum(B[:, k] * ((A[k] * at.x) @ at.W.T) for k in range(rank)) + at.bias  # the paper's pass-through form
    torch.testing.assert_close(at.apply().detach(), passes, rtol=1e-10, atol=1e-10)

    G = check.upstream(at)[1] * at.W
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close(got["A"], B.T @ G, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got["B"], G @ A.T, rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    for method in (FLoRA(), FLoRA(rank=1), FLoRA(rank=4)):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)
    own = FLoRA(rank=3).init(torch.zeros(40, 500), Stream(0), {})
    assert not own["B"].any() and not own["A"][0].any()
    assert abs(own["A"][1:].std() - 1) < 0.1


def test_the_change_is_not_of_low_rank_and_zeros_stay_zero(check):
    at = check.make(FLoRA(rank=2), 16, 16)
    assert torch.linalg.matrix_rank(at.delta.detach()) == 16
    W = at.W * (torch.rand(16, 16) < 0.3)
    assert not at.method.delta(W, at.p)[W == 0].any()


def test_a_small_change_is_not_lost_in_the_ones(check):
    """(1 + b)(1 + a) − 1 in float32, for a and b far below its rounding error."""
    method, W = FLoRA(rank=1), torch.ones(3, 4)
    p = {"A": torch.full((1, 4), 3e-10), "B": torch.full((3, 1), 2e-10)}
    torch.testing.assert_close(method.delta(W, p), torch.full((3, 4), 5e-10), rtol=1e-6, atol=0)


def test_the_base_is_passed_through_r_times():
    model, seen = nn.ModuleDict({"proj": nn.Linear(20, 12)}), []
    attach(model, FLoRA(rank=3), targets="proj")
    real = torch.nn.functional.linear

    def linear(x, *rest):
        seen.append(x.shape)
        return real(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        model["proj"](torch.randn(5, 20))
    assert seen == [(5, 20)] * 3


def test_options_are_checked():
    with pytest.raises(AddendaError, match="rank must be at least 1"):
        FLoRA(rank=0)
    assert "above" in FLoRA(rank=9).check(8, 20)
