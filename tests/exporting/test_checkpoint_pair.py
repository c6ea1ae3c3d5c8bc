"""Two checkpoints: which weights differ, at which sites, and folders that are not two of one model."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from addenda.core.base.errors import AddendaError
from addenda.exporting.checkpoint_pair import CheckpointPair
from addenda.models.checkpoint_files import SINGLE
from architectures import make
from tiny_models import config, make_bert, make_llama


def pair(tmp_path, base, tuned) -> CheckpointPair:
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    tuned.save_pretrained(tmp_path / "tuned")
    return CheckpointPair.of(tmp_path / "base", tmp_path / "tuned")


def move(model, *names):
    with torch.no_grad():
        for name in names:
            p = model.get_parameter(name)
            p.add_(torch.randn(p.shape) * 0.1)
    return model


def test_what_differs_and_what_it_is(tmp_path):
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
    tuned = move(make_llama(), *names)
    found = list(pair(tmp_path, make_llama(), tuned).changed())
    assert [(c.name, c.site.path, c.site.kind.name) for c in found] == [
        ("model.embed_tokens.weight", "model.embed_tokens", "embedding"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj", "linear"),
        ("model.norm.weight", "model.norm.weight", "parameter"),
        ("lm_head.weight", "lm_head", "linear"),
    ]
    for c in found:
        assert torch.equal(c.tuned, tuned.get_parameter(c.name)) and torch.equal(
            c.base, make_llama().get_parameter(c.name)
        )


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_a_tied_weight_is_one_site(name, tmp_path):
    base = make(name)
    shared = base.get_input_embeddings().weight
    tied = [n for n, p in base.named_parameters(remove_duplicate=False) if p is shared]
    (found,) = pair(tmp_path, base, move(make(name), tied[0])).changed()
    assert (found.site.path, found.site.kind.name) == (tied[0], "parameter") and len(tied) > 1


def test_a_tie_that_training_has_cut(tmp_path):
    base, tuned = make("GPT2LMHeadModel"), make("GPT2LMHeadModel")
    tuned.config.tie_word_embeddings = False
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach() + 1.0)
    with pytest.raises(AddendaError, match=r"lm_head\.weight and transformer\.wte\.weight are one weight .* and two"):
        list(pair(tmp_path, move(base, "transformer.wte.weight"), tuned).changed())


def test_stacked_experts_are_found_behind_their_names(tmp_path):
    found = list(pair(tmp_path, make("MixtralForCausalLM"), move(make("MixtralForCausalLM"),
                      "model.layers.1.mlp.experts.down_proj")).changed())  # fmt: skip
    assert [c.site.path for c in found] == ["model.layers.1.mlp.experts.down_proj"] and found[0].base.dim() == 3


def test_what_no_form_makes_smaller_is_copied(tmp_path):
    found = pair(tmp_path, make("MambaForCausalLM"), make("MambaForCausalLM"))
    assert found.is_copied("backbone.layers.0.mixer.conv1d.weight")
    assert not found.is_copied("backbone.layers.0.mixer.in_proj.weight")
    moved = pair(tmp_path / "two", make("MambaForCausalLM"), move(make("MambaForCausalLM"),
                 "backbone.layers.0.mixer.dt_proj.weight"))  # fmt: skip
    assert [c.site.kind.name for c in moved.changed()] == ["parameter"]  # kernels read it without a call


def test_a_head_that_the_base_has_not(tmp_path):
    tuned = make_bert(labels=3)
    base = make_bert(labels=2).bert
    found = {c.name: c for c in pair(tmp_path, base, move(tuned, "bert.pooler.dense.weight")).changed()}
    assert set(found) == {"bert.pooler.dense.weight", "classifier.weight", "classifier.bias"}
    assert found["classifier.weight"].base is None and found["bert.pooler.dense.weight"].base is not None


def test_buffers_are_named(tmp_path):
    tuned = make("ResNetForImageClassification")
    tuned.resnet.embedder.embedder.normalization.running_mean += 1.0
    found = pair(tmp_path, make("ResNetForImageClassification"), tuned)
    assert found.buffers() == ["resnet.embedder.embedder.normalization.running_mean"]
    assert not list(found.changed())


def test_another_model(tmp_path):
    with pytest.raises(
        AddendaError, match=r"LlamaForCausalLM and .* BertForSequenceClassification: no checkpoints of one"
    ):
        pair(tmp_path, make_llama(), make_bert())


def test_a_grown_vocabulary_says_how_many_rows(tmp_path):
    tuned = make_llama()
    rows = tuned.config.vocab_size
    tuned.resize_token_embeddings(rows + 3)
    with pytest.raises(
        AddendaError, match=rf"has {rows} rows in the base and {rows + 3} in the tuned one.*not written yet"
    ):
        pair(tmp_path, make_llama(), tuned)


def test_other_shapes_and_layers_are_listed(tmp_path):
    tuned = transformers.LlamaForCausalLM(config(num_hidden_layers=3, intermediate_size=48))
    with pytest.raises(
        AddendaError, match=r"only the tuned one has model\.layers\.2.*|is \[64, 32\] in the base and \[48, 32\]"
    ):
        pair(tmp_path, make_llama(), tuned)


def test_weights_that_are_missing(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / SINGLE)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "base" / SINGLE, {"format": "pt"})
    make_llama().save_pretrained(tmp_path / "tuned")
    with pytest.raises(AddendaError, match=r"the base has no weights for model\.norm\.weight"):
        CheckpointPair.of(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(AddendaError, match=r"has no weights for 1 parameters .*model\.norm\.weight"):
        CheckpointPair.of(tmp_path / "tuned", tmp_path / "base")
