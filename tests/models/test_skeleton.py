"""A model's structure without its weights: the same names, shapes, classes and ties as the model's, in no memory."""

from contextlib import suppress

import pytest
import torch
import transformers
from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.models.skeleton import filled, give_dtypes, names_of, skeleton, untie
from architectures import make

NAMES = ("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BertForSequenceClassification",
         "MixtralForCausalLM", "WavLMModel")  # fmt: skip


def of(model):
    model.config.architectures = [type(model).__name__]
    return skeleton(model.config)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_model_without_numbers(name):
    model = make(name)
    bare = of(model)
    assert type(bare) is type(model) and not bare.training
    assert {k: (t.shape, t.dtype) for k, t in bare.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in model.state_dict().items()
    }
    assert names_of(bare) == names_of(model)
    assert all(p.untyped_storage().nbytes() <= 8 and p.device.type == "cpu" for p in bare.parameters())


def test_values_are_there_for_a_while_under_all_names():
    bare = of(make("GPT2LMHeadModel"))
    names, before = names_of(bare), dict(bare.named_parameters(remove_duplicate=False))
    value = torch.randn(before["transformer.wte.weight"].shape)
    with suppress(ZeroDivisionError), filled(bare, {"transformer.wte.weight": value}, names):
        assert torch.equal(bare.lm_head.weight, value) and bare.lm_head.weight is bare.transformer.wte.weight
        raise ZeroDivisionError
    after = dict(bare.named_parameters(remove_duplicate=False))
    assert all(after[k] is p for k, p in before.items())


def test_dtypes_and_ties_can_be_given():
    bare = of(make("GPT2LMHeadModel"))
    give_dtypes(bare, {"lm_head.weight": torch.float16, "transformer.ln_f.bias": torch.bfloat16})
    assert bare.transformer.wte.weight.dtype == torch.float16 and bare.transformer.ln_f.bias.dtype == torch.bfloat16
    assert bare.transformer.ln_f.weight.dtype == torch.float32
    untie(bare, "lm_head.weight")
    assert bare.lm_head.weight is not bare.transformer.wte.weight
    assert isinstance(bare.lm_head.weight, nn.Parameter)


def test_what_has_no_known_structure_is_refused():
    config = make("LlamaForCausalLM").config
    config.architectures = None
    with pytest.raises(AddendaError, match="names no architecture"):
        skeleton(config)
    for wrong in (3, "LlamaForCausalLM", {"a": 1}):
        config.architectures = wrong
        with pytest.raises(AddendaError, match="names no architecture"):
            skeleton(config)
    config.architectures = [["MyOwnModel"]]
    with pytest.raises(AddendaError, match=r"MyOwnModel.* which transformers does not have"):
        skeleton(config)
    config.architectures = ["MyOwnModel"]
    with pytest.raises(AddendaError, match="is a MyOwnModel, which transformers does not have"):
        skeleton(config)
    config.architectures, config.quantization_config = ["LlamaForCausalLM"], {"quant_method": "gptq"}
    with pytest.raises(AddendaError, match=r"quantised .*quantise the result again"):
        skeleton(config)


def test_what_cannot_be_made_says_why(monkeypatch):
    def broken(self, config):
        raise RuntimeError("wants numbers\nand more")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", broken)
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    with pytest.raises(AddendaError, match=r"LlamaForCausalLM could not be made .*RuntimeError: wants numbers\)"):
        skeleton(config)
