"""BAT against the block formula computed one block at a time, and against PEFT's BAT-out."""

import pytest
import torch
from torch import nn

from addenda import attach
from addenda.methods.bat import BAT


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("shape", [(12, 12), (16, 12), (8, 20)])
def test_reference(check, shape, axis):
    at, r = check.make(BAT(rank=4, axis=axis), *shape), 4
    delta, B, G = at.delta.detach(), at.p["B"].detach(), check.upstream(at)[1]
    gradient = torch.zeros_like(B)
    eye = torch.eye(r, dtype=torch.float64)
    for a in range(shape[0] // r):
        for c in range(shape[1] // r):
            block = (slice(a * r, a * r + r), slice(c * r, c * r + r))
            s = a if axis == "out" else c
            new = at.W[block] @ (eye + B[s]) + B[s]
            torch.testing.assert_close((at.W + delta)[block], new, rtol=1e-10, atol=1e-10)
            gradient[s] += (at.W[block].T + eye) @ G[block]
            unmerged = (new - B[s]) @ torch.linalg.inv(eye + B[s])
            torch.testing.assert_close(unmerged, at.W[block], rtol=1e-8, atol=1e-8)
    check.forms_agree(at)
    for through in ("delta", "apply") if axis == "in" else ("delta",):
        torch.testing.assert_close(check.gradients(at, through)["B"], gradient, rtol=1e-9, atol=1e-9)


def test_only_the_input_axis_runs_on_activations():
    assert BAT(axis="in").has("apply")
    assert not BAT(axis="out").has("apply")
    assert BAT(axis="out").has("delta")


def test_the_change_has_full_rank(check):
    assert torch.linalg.matrix_rank(check.make(BAT(rank=8), 64, 64).delta.detach()) == 64


@pytest.mark.parametrize("axis", ["out", "in"])
def test_start_and_counts(check, axis):
    check.starts_exactly(BAT(rank=16, axis=axis))
    check.starts_exactly(BAT(rank=10, axis=axis), 50, 70)
    check.counts(BAT(rank=32, axis=axis), [(64, 64), (96, 64), (64, 96)])
    check.counts(BAT(rank=10, axis=axis), [(50, 70)])


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_forward():
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.MissConfig(r=4, init_weights="bat", target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, BAT(rank=4), targets="proj").sites())
    with torch.no_grad():
        layer.miss_block["default"].copy_(tensors.B.normal_())
    x = torch.randn(2, 7, 20)
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-5, atol=1e-5)


def test_blocks_must_fit():
    assert "does not divide" in BAT(rank=16).check(50, 70)
    assert BAT(rank=10).check(50, 70) is None
