"""Names and values of files as the model has them: compared with what transformers itself loads, and back to bytes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from addenda.core.base.errors import AddendaError
from addenda.models.checkpoint_files import SINGLE, CheckpointFiles
from addenda.models.named_weights import NamedWeights
from addenda.models.skeleton import skeleton
from architectures import ARCHITECTURES, make

STACKED = {"MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "JambaForCausalLM"}


def of(folder, architecture=None) -> NamedWeights:
    return NamedWeights.of(
        CheckpointFiles.of(folder), skeleton(transformers.AutoConfig.from_pretrained(folder), architecture)
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_is_the_one_that_transformers_loads(name, tmp_path):
    make(name).save_pretrained(tmp_path, max_shard_size="8KB")
    loaded = getattr(transformers, name).from_pretrained(tmp_path).state_dict()
    weights, names = of(tmp_path), set()
    for unit in weights.units:
        for key, t in weights.read(unit).items():
            assert torch.equal(t, loaded[key]) and t.dtype == loaded[key].dtype
            names.add(key)
        weights.check_back(unit)
        back = weights.back(unit, weights.read(unit))
        assert all(torch.equal(t, weights.files.read(k)) for k, t in back.items()) and set(back) == set(unit.sources)
    assert not weights.missing and not weights.unread
    assert set(weights.files.tensors) == {k for unit in weights.units for k in unit.sources}
    assert any(unit.converter is not None for unit in weights.units) == (name in STACKED)
    for key, t in loaded.items():
        if key in weights.names:
            assert torch.equal(weights.weight(key), t)


def test_a_changed_expert_goes_back_to_its_own_tensor(tmp_path):
    make("MixtralForCausalLM").save_pretrained(tmp_path)
    weights = of(tmp_path)
    unit = weights.unit_of["model.layers.1.mlp.experts.gate_up_proj"]
    values = weights.read(unit)
    values["model.layers.1.mlp.experts.gate_up_proj"][2, 3, 5] += 1.0  # expert 2, row 3: of gate, w1
    back = weights.back(unit, values)
    changed = [k for k, t in back.items() if not torch.equal(t, weights.files.read(k))]
    assert changed == ["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    difference = back[changed[0]] - weights.files.read(changed[0])
    assert difference.nonzero().tolist() == [[3, 5]]


def test_a_folder_without_the_head_and_one_with_it(tmp_path):
    model = make("BertForSequenceClassification")
    model.bert.save_pretrained(tmp_path / "body")
    weights = of(tmp_path / "body", "BertForSequenceClassification")
    assert weights.missing == ("classifier.weight", "classifier.bias")
    assert weights.unit_of["bert.encoder.layer.0.output.dense.weight"].sources == (
        "encoder.layer.0.output.dense.weight",
    )
    model.save_pretrained(tmp_path / "whole")
    body = of(tmp_path / "whole", "BertModel")
    assert body.unread == ("classifier.bias", "classifier.weight") and not body.missing
    assert torch.equal(body.weight("embeddings.word_embeddings.weight"), model.bert.embeddings.word_embeddings.weight)


def test_tied_names_that_are_both_stored(tmp_path):
    model = make("GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    assert of(tmp_path).names["lm_head.weight"] == ("transformer.wte.weight", "lm_head.weight")
    tensors["lm_head.weight"] += 1.0  # then they are two, as transformers takes it
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    weights = of(tmp_path)
    assert weights.names["lm_head.weight"] == ("lm_head.weight",)
    assert torch.equal(weights.weight("lm_head.weight"), tensors["lm_head.weight"])


def test_a_tie_of_which_only_the_second_name_is_stored(tmp_path):
    make("GPT2LMHeadModel").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    weights = of(tmp_path)
    assert weights.holder("transformer.wte.weight") == "lm_head.weight" and not weights.missing
    with pytest.raises(KeyError):
        weights.weight("transformer.h.9.attn.c_attn.weight")


def test_weights_of_other_shapes_are_listed(tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.norm.weight"] = torch.ones(15)
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(AddendaError, match=r"1 weights .*model\.norm\.weight: \[15\] in the file, \[16\] wanted"):
        of(tmp_path)


def test_what_does_not_come_back_is_refused(tmp_path, monkeypatch):
    make("MixtralForCausalLM").save_pretrained(tmp_path)
    weights = of(tmp_path)
    unit = next(u for u in weights.units if u.converter is not None)
    monkeypatch.setattr(
        "transformers.core_model_loading.Concatenate.reverse_op",
        property(lambda self: (_ for _ in ()).throw(ValueError("no"))),
    )
    with pytest.raises(AddendaError, match="cannot be written back as they lay"):
        weights.check_back(unit)
