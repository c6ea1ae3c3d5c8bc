"""hqq's layers as packed weights, against what hqq makes of its bytes."""

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.quantizing.bridges import adopt, read, release

pytest.importorskip("hqq")
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # pyright: ignore[reportMissingImports]


def quantised(module: nn.Linear, bits=4, group=32, axis=1) -> HQQLinear:
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    return HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)


@pytest.mark.parametrize(("bits", "group", "axis"), [(4, 64, 1), (4, 64, 0), (3, 64, 1), (8, 128, 1)])
def test_values_products_and_gradients_are_the_librarys(bits, group, axis):
    theirs = quantised(nn.Linear(128, 96), bits, group, axis)
    model, x, g, found = nn.Sequential(theirs), torch.randn(5, 128), torch.randn(5, 96), []
    torch.testing.assert_close(read(theirs).unpack(), theirs.dequantize(), rtol=0, atol=0)
    for turn in range(2):
        xs = x.clone().requires_grad_()
        y = model(xs)
        y.backward(g)
        found.append((y.detach(), xs.grad))
        if not turn:
            assert adopt(model) == ["0"] and type(model[0]) is nn.Linear
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert release(model) == ["0"] and model[0] is theirs


def test_adapters_and_merges():
    model, ids = toys.make_llama(hidden_size=64, intermediate_size=128), torch.arange(12).reshape(2, 6)
    for path, module in list(model.named_modules()):
        if path.endswith("_proj"):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantised(module))
    assert len(adopt(model)) == 14
    adapter = ad.attach(model, ad.LoRA(rank=2), targets="mlp")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    wanted = model(ids).logits
    wanted.square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    ad.merge(model, verify={"input_ids": ids})
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-4)
    ad.unmerge(model)
    torch.testing.assert_close(model(ids).logits, wanted)
    with pytest.raises(AddendaError, match="can be read as"):
        ad.merge(model, requantize=True)
