"""MiLoRA against the residual form of its paper."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.milora import MiLoRA


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("shape", [(12, 12), (12, 7), (7, 15)])
def test_is_the_papers_residual_form(check, shape, alpha):
    """W − s B₀A₀ + s (B₀+dB)(A₀+dA), with s B₀A₀ the three smallest singular triplets of W."""
    at, s = check.make(MiLoRA(rank=3, alpha=alpha), *shape), (alpha or 3) / 3
    U, S, Vh = torch.linalg.svd(at.W, full_matrices=False)
    minor = sum(S[-k] * torch.outer(U[:, -k], Vh[-k]) for k in (1, 2, 3))
    A0, B0, A, B = at.p["A0"], at.p["B0"], at.p["A"].detach(), at.p["B"].detach()
    torch.testing.assert_close(s * B0 @ A0, minor, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A0.norm(dim=1), B0.norm(dim=0))
    new = at.W - minor + s * (B0 + B) @ (A0 + A)
    torch.testing.assert_close(at.W + at.delta.detach(), new, rtol=1e-9, atol=1e-9)
    check.forms_agree(at)
    G = check.upstream(at)[1]
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close(got["A"], s * (B0 + B).T @ G, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got["B"], s * G @ (A0 + A).T, rtol=1e-9, atol=1e-9)


def test_the_pair_is_what_acts(check):
    at = check.make(MiLoRA(rank=3, alpha=6.0), 12, 7)
    B, A, scale, left, right = at.method.pair(at.p)
    start = scale * at.p["B0"] @ at.p["A0"]
    torch.testing.assert_close(scale * B @ A - start, at.delta)
    assert (left, right) == ("B", "A")


def test_start_and_counts(check):
    for method in (MiLoRA(rank=4), MiLoRA(rank=4, alpha=3.0)):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)


def test_a_weight_of_low_rank_is_refused():
    model = nn.ModuleDict({"proj": nn.Linear(20, 12)})
    with torch.no_grad():
        model["proj"].weight[6:] = model["proj"].weight[:6]
    attach(model, MiLoRA(rank=7), targets="proj", name="one-more")
    with pytest.raises(AddendaError, match="nothing would learn"):
        attach(model, MiLoRA(rank=6), targets="proj")


def test_options_and_shapes_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"alpha": 0.0}, "alpha must"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(AddendaError, match=message):
            MiLoRA(**options)
    assert "above" in MiLoRA(rank=9).check(8, 20)
