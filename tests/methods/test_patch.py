"""Patch: replaced entries and no others, exactly, in every dtype of a base."""

import copy

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError
from addenda.exporting.install import install
from addenda.methods.patch import Patch
from addenda.reducing.delta import difference


@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape):
    at = check.make(Patch(density=0.3), *shape)
    index, values = at.p["index"].tolist(), at.p["values"].detach()
    assert len(index) == len(set(index)) == at.method.trainable(*shape) == round(0.3 * shape[0] * shape[1])
    want = at.W.clone()
    for v, flat in zip(values, index, strict=True):
        want[flat // shape[1], flat % shape[1]] = v
    assert torch.equal(at.method.effective(at.W, at.p), want) and not torch.equal(want, at.W)
    torch.testing.assert_close(at.delta.detach(), want - at.W, rtol=0, atol=0)
    check.forms_agree(at)
    G = check.upstream(at)[1]
    torch.testing.assert_close(check.gradients(at)["values"], G.flatten()[index], rtol=0, atol=0)


def test_start_and_counts(check):
    for method in (Patch(), Patch(count=7)):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)
    assert Patch(count=7).trainable(100, 200) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_tuned_weights_come_back_bit_for_bit(dtype, tmp_path):
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype)
    tuned, x = copy.deepcopy(base), torch.randn(4, 20).to(dtype)
    with torch.no_grad():
        for layer in (tuned[0], tuned[2]):
            layer.weight.add_(torch.randn_like(layer.weight) * 3e-3)  # in half precision many do not change
            layer.bias.copy_(base.get_parameter("0.bias" if layer is tuned[0] else "2.bias"))
    forms = {}
    for path in ("0", "2"):
        W = base.get_submodule(path).weight
        found = difference(W, tuned.get_submodule(path).weight)
        assert len(found.index) > 0 and (dtype == torch.float32 or len(found.index) < W.numel())
        forms[path] = Patch(count=len(found.index)), {"values": found.values, "index": found.index.int()}
    with torch.no_grad():
        want = tuned(x)
        assert not torch.equal(base(x), want)
        adapter = install(base, forms, name="tuned", activate=True)
        assert torch.equal(base(x), want)
        adapter.save(tmp_path / "tuned.safetensors")
        ad.detach(base)
        ad.load(base, tmp_path / "tuned.safetensors")
        assert torch.equal(base(x), want)
        ad.merge(base, verify=x)
        assert all(torch.equal(base.get_parameter(n), p) for n, p in tuned.named_parameters())


def test_impossible_options_are_refused():
    for options in ({"density": 0.0}, {"density": 1.5}, {"count": 0}):
        with pytest.raises(AddendaError, match="must be"):
            Patch(**options)
    assert "above 3 × 4" in Patch(count=13).check(3, 4)
