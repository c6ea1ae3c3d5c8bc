"""RoAd against 2 × 2 matrices written out pair by pair, and PEFT, which turns the bias too."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.road import RoAd

VARIANTS = ("road_1", "road_2", "road_4")


def rotation(angle, scale, variant, group, m):
    """R of the paper's equation (3) for pairs half a group apart; the numbers of each group stand together."""
    R, half = torch.zeros(m, m, dtype=angle.dtype), group // 2
    for start in range(0, m, group):
        for k in range(half):
            i, j = start + k, start + k + half
            if variant == "road_1":
                own = other = (start // 2 + k,) * 2
            elif variant == "road_2":
                own = other = (i, j)
            else:
                own, other = (start + i, start + j), (start + group + i, start + group + j)
            for row, column, at, sign in ((i, j, 0, -1), (j, i, 1, 1)):
                R[row, row] = (1 + scale[own[at]]) * angle[own[at]].cos()
                R[row, column] = sign * (1 + scale[other[at]]) * angle[other[at]].sin()
    return R


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("shape", "group"), [((8, 8), 2), ((12, 7), 6), ((16, 5), 4), ((8, 3), 8)])
def test_reference(check, shape, group, variant):
    at = check.make(RoAd(variant=variant, group=group), *shape)
    angle, scale = (at.p[k].detach().clone().requires_grad_() for k in ("angle", "scale"))
    new = rotation(angle, scale, variant, group, shape[0]) @ at.W
    torch.testing.assert_close((at.W + at.delta).detach(), new.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    want = torch.autograd.grad((check.upstream(at)[1] * new).sum(), (angle, scale))
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close((got["angle"], got["scale"]), want, rtol=1e-9, atol=1e-9)


def test_without_scales_norms_and_spectrum_stay(check):
    at = check.make(RoAd(), 12, 9)
    p = {**at.p, "scale": torch.zeros_like(at.p["scale"])}
    new = (at.W + at.method.delta(at.W, p)).detach()
    torch.testing.assert_close(new.T @ new, at.W.T @ at.W)
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(at.W))
    assert (new - at.W).norm() > 0.1 * at.W.norm()


def test_start_and_counts(check):
    for variant, times in zip(VARIANTS, (1, 2, 4), strict=True):
        check.starts_exactly(RoAd(variant=variant, group=64))
        check.starts_exactly(RoAd(variant=variant), 50, 70)
        check.counts(RoAd(variant=variant))
        assert RoAd(variant=variant).trainable(64, 96) == 64 * times


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [2, 8])
def test_peft_turns_the_same_and_the_bias_too(group, variant, bias):
    peft = pytest.importorskip("peft")
    base = nn.ModuleDict({"proj": nn.Linear(20, 16, bias=bias)})
    theirs = nn.ModuleDict({"proj": nn.Linear(20, 16, bias=bias)})
    theirs.load_state_dict(base.state_dict())
    config = peft.RoadConfig(variant=variant, group_size=group, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, RoAd(variant=variant, group=group), targets="proj").sites())
    with torch.no_grad():
        layer.road_theta["default"].copy_(tensors.angle.normal_())
        layer.road_alpha["default"].copy_(1 + tensors.scale.normal_(std=0.3))
        x = torch.randn(2, 7, 20)
        got, want = base["proj"](x), layer(x)
        if bias:
            b = base["proj"].bias
            R = rotation(tensors.angle, tensors.scale, variant, group, 16)
            assert (got - want).norm() > 0.01 * want.norm()
            want = want - R @ b + b
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_options_and_shapes_are_checked():
    assert "group=64 does not divide the output width 50" in RoAd(group=64).check(50, 64)
    assert RoAd().check(50, 3) is None
    for group in (0, 3):
        with pytest.raises(AddendaError, match="group must be even"):
            RoAd(group=group)
    with pytest.raises(AddendaError, match="variant must be one of"):
        RoAd(variant="road_3")
