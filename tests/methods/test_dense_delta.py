"""Dense ΔW: the change is the tensor, and in few bits its codes."""

import torch

import addenda as ad
from addenda.core.packed.few_bits import quantised
from addenda.methods.dense_delta import DenseDelta


def test_reference(check):
    at = check.make(DenseDelta(), 12, 7)
    torch.testing.assert_close(at.delta, at.p["change"], rtol=0, atol=0)
    check.forms_agree(at)
    torch.testing.assert_close(check.gradients(at)["change"], check.upstream(at)[1], rtol=0, atol=0)


def test_start_and_counts(check):
    check.starts_exactly(DenseDelta())
    check.counts(DenseDelta())


def test_in_one_bit_it_is_two_values(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    W, x = model[0].weight.detach().clone(), torch.randn(3, 8)
    adapter = ad.attach(model, DenseDelta(bits=1), targets="0")
    (change,) = adapter.parameters()
    with torch.no_grad():
        change.copy_(torch.randn(6, 8) * 0.1)
    values = quantised(change, 1)
    assert len(values.unique()) == 2
    want = torch.nn.functional.linear(x, W + values, model[0].bias)
    torch.testing.assert_close(model(x), want)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(model)
    ad.load(model, file)
    torch.testing.assert_close(model(x), want)
