"""A weight that is changed one way and read back the other: every kind of layer, as a layer and as a raw parameter."""

import peft
import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from peft_folders import by_peft, in_peft, outputs, same
from shared import bits, same_bits, stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def make_untied() -> nn.Module:
    return toys.make_llama(tie_word_embeddings=False)


def make_conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, (2, 3), padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(80, 5))


IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LAYERS = {  # Conv1D: one wide and one square, where a transposed copy would fit
    "linear": (make_untied, IDS, "model.layers.0.mlp.up_proj"),
    "conv1d": (toys.make_gpt2, IDS, "transformer.h.0.mlp.c_fc"),
    "square conv1d": (toys.make_gpt2, IDS, "transformer.h.0.attn.c_proj"),
    "conv": (make_conv, IMAGE, "0"),
    "embedding": (make_untied, IDS, "model.embed_tokens"),
}
TOKENS = ad.TrainableTokens(tokens="5+10+15")
METHODS = [("full", row) for row in LAYERS] + [(ad.LoRA(rank=2), row) for row in LAYERS]
METHODS += [(TOKENS, "embedding"), ("miss:rank=2", "linear")]


@pytest.mark.parametrize("end", ["", ".weight"], ids=["layer", "parameter"])
@pytest.mark.parametrize(("method", "row"), METHODS, ids=lambda v: getattr(type(v), "name", "") or str(v))
def test_a_change_passes_to_peft_as_a_layer_and_as_a_parameter(method, row, end, tmp_path):
    make, batch, path = LAYERS[row]
    model = make()
    base, before = outputs(model, batch), bits(model)
    try:
        adapter = stir(ad.attach(model, method, targets=path + end), 0.4)
    except AddendaError:
        assert (row, end) == ("conv", ".weight")  # four dimensions: no matrix, and no stack of them
        return
    wanted = outputs(model, batch)
    report = ad.export(adapter, "peft", tmp_path / "out", probe=batch)
    assert report.exact and [*ad.adapters(model)] == ["default"]
    same(in_peft(make, tmp_path / "out", batch), wanted, base)
    ad.detach(model)
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("end", ["", ".weight"], ids=["layer", "parameter"])
def test_it_passes_to_vllm_either_way(end, tmp_path):
    adapter = stir(ad.attach(make_untied(), ad.LoRA(rank=2), targets=["up_proj" + end, "*q_proj" + end]), 0.4)
    report = ad.export(adapter, "vllm", tmp_path / "out")
    assert report.exact and report.effect.relative < 1e-5


def test_what_peft_trained_at_a_layers_parameter_goes_back_and_to_vllm(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.up_proj.weight"])
    base, wanted = outputs(make_untied(), IDS), by_peft(make_untied, config, tmp_path / "peft", IDS, 0.4)
    adapter = ad.import_adapter(make_untied(), tmp_path / "peft")
    assert [*adapter.methods] == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    ad.export(adapter, "vllm", tmp_path / "vllm")
    ad.export(adapter, "peft", tmp_path / "back")
    same(in_peft(make_untied, tmp_path / "back", IDS), wanted, base)


def test_a_combination_in_dense_form_passes(tmp_path):
    model = make_untied()
    base = outputs(model, IDS)
    parts = [stir(ad.attach(model, ad.LoRA(rank=2), targets="mlp", name=n), 0.4, i) for i, n in enumerate("ab")]
    made = ad.combine(parts, how="ties", form="dense").adapter
    ad.switch(model, made.name)
    wanted = outputs(model, IDS)
    ad.export(made, "peft", tmp_path / "out")
    same(in_peft(make_untied, tmp_path / "out", IDS), wanted, base)
