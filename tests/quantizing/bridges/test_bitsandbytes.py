"""bitsandbytes' layers as packed weights, against what bitsandbytes itself makes of its bytes; NF4 side by side."""

import copy

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.packed.nf4 import NF4Tensor
from addenda.quantizing.bridges import adopt, read, release
from addenda.quantizing.quantize import dequantize

bnb = pytest.importorskip("bitsandbytes")


def layer(how: str, plain: nn.Linear | None = None):
    """A layer that bitsandbytes has quantised on the CPU, by how: "nf4", "fp4 plain" (scales in float32), "int8"."""
    plain = plain or nn.Linear(128, 96)
    sizes = (plain.in_features, plain.out_features, plain.bias is not None)
    if how == "int8":
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        kind, _, flat = how.partition(" ")
        made = bnb.nn.Linear4bit(*sizes, quant_type=kind, compress_statistics=not flat)
    made.load_state_dict(plain.state_dict())
    return made.to("cpu")


def of(model: nn.Module, how: str) -> nn.Module:
    """The model with its linear layers quantised by bitsandbytes."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer(how, module))
    return model.train()


HOW = ["nf4", "nf4 plain", "fp4", "int8"]


@pytest.mark.parametrize("how", HOW)
def test_values_products_and_gradients_are_the_librarys(how):
    theirs = layer(how)
    packed = read(theirs)
    if how == "int8":
        wanted = theirs.weight.data.float() * theirs.weight.SCB[:, None] / 127
    else:
        wanted = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state).float()
    torch.testing.assert_close(packed.unpack(), wanted, rtol=1e-6, atol=0)
    model = nn.Sequential(theirs)
    x, g = torch.randn(5, 128), torch.randn(5, 96)
    found = []
    for turn in range(2):
        xs = x.clone().requires_grad_()
        y = model(xs)
        y.backward(g)
        found.append((y.detach(), xs.grad))
        if not turn:
            assert adopt(model) == ["0"] and type(model[0]) is nn.Linear
            assert model[0].bias is theirs.bias and model[0].weight.codes.data_ptr() == packed.codes.data_ptr()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    moved = copy.deepcopy(model)
    assert torch.equal(moved[0].weight.dense(), model[0].weight.dense())
    assert release(model) == ["0"] and model[0] is theirs and read(model[0]) is not None
    with torch.no_grad():
        theirs.eval()(x)
    if how == "int8" or not theirs.weight.quant_state.__dict__.get("packing_format_for_cpu"):
        assert torch.equal(read(theirs).dense(), packed.dense())
    else:  # repacked for this processor
        with pytest.raises(AddendaError, match="adopt it before it is first evaluated"):
            adopt(model)


def test_error_and_bits_of_nf4_are_within_a_hundredth():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(576, 1536, generator=g) * 0.05
    codes, state = bnb.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    error = float((bnb.functional.dequantize_4bit(codes, state) - W).norm())
    stored = [codes, state.absmax, state.state2.absmax, state.offset]
    bits = 8 * sum(t.numel() * t.element_size() for t in stored) / W.numel()
    ours = NF4Tensor.of(W)
    assert float((ours.dense() - W).norm()) == pytest.approx(error, rel=0.01)
    assert ours.bits == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_adapters_files_and_merges(how, tmp_path):
    ids = torch.arange(12).reshape(2, 6)
    model = of(toys.make_llama(hidden_size=64, intermediate_size=128), how)
    with pytest.raises(AddendaError, match=r"addenda\.adopt"):
        ad.attach(model, ad.LoRA(rank=2), targets="linear")
    assert len(adopt(model)) == 14
    before = model(ids).logits.detach()
    for method in (ad.LoRA(rank=2), ad.OFT(block=8)):
        adapter = ad.attach(model, method, targets="linear")
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        y = model(ids).logits
        y.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
        assert all(p.grad is None for n, p in model.named_parameters() if ".addenda." not in n)
        wanted = y.detach()
        adapter.save(tmp_path / "a.safetensors")
        ad.merge(model, verify={"input_ids": ids})
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-4)
        ad.unmerge(model)
        assert torch.equal(model(ids).logits.detach(), wanted)
        with pytest.raises(AddendaError, match="can be read as Bits"):
            ad.merge(model, requantize=True)
        with pytest.raises(AddendaError, match="detach"):
            release(model)
        ad.detach(model)
        fresh = copy.deepcopy(model)
        ad.load(fresh, tmp_path / "a.safetensors")
        torch.testing.assert_close(fresh(ids).logits.detach(), wanted, rtol=1e-5, atol=1e-6)
    fresh = copy.deepcopy(model)
    fresh.model.layers[0].mlp.up_proj.weight.codes.view(-1)[0] ^= 1
    with pytest.raises(AddendaError, match="other base weights"):
        ad.load(fresh, tmp_path / "a.safetensors")
    assert len(release(model)) == 14
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int8_without_biases_has_the_dtype_of_the_model(dtype):
    ids = torch.arange(12).reshape(2, 6)
    model = of(toys.make_llama(hidden_size=64, intermediate_size=128).to(dtype), "int8").eval()
    adopt(model)
    unpacked = copy.deepcopy(model)
    dequantize(unpacked)
    assert unpacked(ids).logits.dtype == dtype
    adapter = ad.attach(model, ad.LoRA(rank=2), targets="linear")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    ad.merge(model, allow_loss=1.0)
    assert {p.dtype for n, p in model.named_parameters() if ".addenda." not in n} == {dtype}
    assert model(ids).logits.dtype == dtype
    assert read(layer("int8", nn.Linear(8, 8, bias=False))).dtype == torch.float32


def test_what_is_not_quantised_yet_is_left_and_a_hook_is_refused():
    fresh = nn.Sequential(bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False), nn.Linear(16, 16))
    assert adopt(fresh) == []
    model = nn.Sequential(layer("nf4"))
    model[0].__dict__["forward"] = model[0].forward
    with pytest.raises(AddendaError, match="forward was replaced"):
        adopt(model)
