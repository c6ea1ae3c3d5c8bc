"""MiSS against sums over groups written with loops, and against PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.miss import MiSS


@pytest.mark.parametrize("mini", [None, 4])
@pytest.mark.parametrize(("m", "n", "r"), [(12, 12, 4), (8, 23, 5), (8, 5, 5)])
def test_reference(check, m, n, r, mini):
    at = check.make(MiSS(rank=r, mini=mini), m, n)
    D, want = at.p["D"].detach(), torch.zeros(m, n, dtype=torch.float64)
    for o in range(m):
        for c in range(n):  # input c is in place c mod r of its group
            want[o, c] = D[c % r, o % D.shape[1]]
    torch.testing.assert_close(at.delta.detach(), want, rtol=0, atol=0)
    assert torch.linalg.matrix_rank(want) <= min(r, mini or r)
    check.forms_agree(at)
    images = torch.randn(2, 3, 4, n, dtype=torch.float64)
    torch.testing.assert_close(at.apply(images).detach(), images @ (at.W + want).T + at.bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [12, 23])
def test_gradients_are_those_of_a_lora_with_a_frozen_tile(check, n):
    at = check.make(MiSS(rank=5), 8, n)
    Y, G = check.upstream(at)
    tile = torch.zeros(5, n, dtype=torch.float64)
    tile[torch.arange(n) % 5, torch.arange(n)] = 1
    S = at.x @ tile.T
    for through in ("delta", "apply"):
        got = check.gradients(at, through)["D"]
        torch.testing.assert_close(got, tile @ G.T, rtol=1e-10, atol=1e-10)  # = gBᵀ with A = T
        torch.testing.assert_close(got, torch.einsum("abr,abm->rm", S, Y), rtol=1e-10, atol=1e-10)


def test_first_gradient_is_larger_than_loras_by_the_square_root_of_three_groups():
    n, r, g = 1536, 32, 48
    G = torch.randn(64, n, dtype=torch.float64)
    miss = G.view(64, g, r).sum(1).norm()
    A = (torch.rand(r, n, dtype=torch.float64) * 2 - 1) / n**0.5
    assert miss / (G @ A.T).norm() == pytest.approx((3 * g) ** 0.5, rel=0.05)


def test_start_and_counts(check):
    check.starts_exactly(MiSS(rank=16))
    check.starts_exactly(MiSS(rank=16, mini=10), 50, 70)
    check.counts(MiSS(rank=16))
    check.counts(MiSS(rank=16, mini=2))


def test_published_count():
    """Llama-2-7B, all linears, r = 64: 87.0 M."""
    sites = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert round(32 * sum(MiSS(rank=64).trainable(*s) for s in sites) / 1e6, 2) == 87.03


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mini", [None, 3])
@pytest.mark.parametrize("n", [20, 23])
def test_peft_has_the_same_forward(n, mini):
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(n, 12)}), nn.ModuleDict({"proj": nn.Linear(n, 12)})
    theirs.load_state_dict(base.state_dict())
    options = {"init_weights": "mini", "mini_r": mini} if mini else {}
    config = peft.MissConfig(r=5, target_modules=["proj"], **options)
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, MiSS(rank=5, mini=mini), targets="proj").sites())
    with torch.no_grad():
        layer.miss_block["default"].copy_(tensors.D.normal_())
    x = torch.randn(2, 7, n)
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-5, atol=1e-5)


def test_shapes_and_options_are_checked():
    assert "above the input width" in MiSS(rank=9).check(20, 8)
    assert "does not divide" in MiSS(rank=4, mini=3).check(20, 8)
    with pytest.raises(AddendaError, match="mini must be at least 1"):
        MiSS(mini=0)
