"""FourierFT against sums of cosines, in both of its forms, and PEFT."""

import math

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.base.random import Stream
from addenda.methods.fourierft import FourierFT

FEW, MANY = FourierFT(frequencies=12, alpha=30.0), FourierFT(frequencies=80, alpha=30.0)


def waves(c, positions, m, n, alpha):
    """α/(mn) Σ c cos(2π (u j/m + v k/n)), one wave after another."""
    j, k = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    total = torch.zeros(m, n, dtype=torch.float64)
    for value, index in zip(c, positions.tolist(), strict=True):
        u, v = index // n, index % n
        total = total + value * torch.cos(2 * math.pi * (u * j / m + v * k / n))
    return total * alpha / (m * n)


@pytest.mark.parametrize("method", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape, method):
    at = check.make(method, *shape)
    positions = Stream(0, "site").choice(shape[0] * shape[1], method.frequencies)
    c = at.p["c"].detach().clone().requires_grad_()
    want = waves(c, positions, *shape, 30.0)
    torch.testing.assert_close(at.delta.detach(), want.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    (expected,) = torch.autograd.grad((check.upstream(at)[1] * want).sum(), c)
    torch.testing.assert_close(check.gradients(at)["c"], expected, rtol=1e-9, atol=1e-9)


def test_few_frequencies_are_thin_factors(check):
    at = check.make(FourierFT(frequencies=3), 40, 30)
    assert at.method.has("factors")
    assert torch.linalg.matrix_rank(at.delta.detach()) <= 6
    assert not MANY.has("factors")
    expected = check.gradients(at, "delta")["c"]
    torch.testing.assert_close(check.gradients(at, "apply")["c"], expected, rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    for method in (FourierFT(), FourierFT(frequencies=20)):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)
    assert FourierFT().trainable(768, 768) == 1000


def test_every_site_has_positions_of_its_own_that_are_not_saved():
    model = nn.ModuleDict({"a": nn.Linear(20, 12), "b": nn.Linear(20, 12)})
    adapter = attach(model, FourierFT(frequencies=70), targets=["a", "b"])
    a, b = (t for _, t in adapter.sites())
    assert len(a.index.unique()) == 70
    assert not torch.equal(a.index, b.index)
    assert set(adapter.state_dict()) == {"a/c", "b/c"}


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_forward():
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.FourierFTConfig(n_frequency=70, scaling=50.0, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, FourierFT(frequencies=70, alpha=50.0), targets="proj").sites())
    index = tensors.index.long()
    layer.indices["default"] = torch.stack([index // 20, index % 20])
    with torch.no_grad():
        layer.fourierft_spectrum["default"].copy_(tensors.c.normal_())
    x = torch.randn(2, 7, 20)
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-4, atol=1e-4)


def test_options_and_shapes_are_checked():
    for options, message in (({"frequencies": 0}, "frequencies must"), ({"alpha": 0.0}, "alpha must not")):
        with pytest.raises(AddendaError, match=message):
            FourierFT(**options)
    assert "above 20 · 30" in FourierFT(frequencies=601).check(20, 30)
    assert FourierFT(frequencies=600).check(20, 30) is None
