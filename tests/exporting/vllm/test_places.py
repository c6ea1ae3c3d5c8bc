"""The modules of a model that vLLM's adapters may name."""

import pytest
import torch

import addenda as ad
import toys
from addenda.exporting.vllm.architectures import is_classifier, outer_modules
from addenda.exporting.vllm.places import Place, by_site, places


def test_a_model_of_language_has_its_linear_layers_its_embedding_and_its_head():
    found = places(toys.make_llama(tie_word_embeddings=False))
    assert len(found) == 2 * 7 + 2
    assert found["model.embed_tokens"] == Place("model.embed_tokens", (32, 8), embedding=True)
    assert found["lm_head"] == Place("lm_head", (32, 8))
    assert found["model.layers.1.mlp.down_proj"].shape == (8, 16)


def test_tied_layers_are_one_site_with_two_places_and_adapters_change_no_path():
    model = toys.make_llama()
    before = places(model)
    ad.attach(model, ad.LoRA(rank=2), targets=["model.embed_tokens.weight", "linear"], name="a")
    assert places(model) == before
    assert set(by_site(model)["model.embed_tokens.weight"]) == {"model.embed_tokens", "lm_head"}
    assert by_site(model)["model.layers.0.mlp.up_proj.weight"] == by_site(model)["model.layers.0.mlp.up_proj"]


def test_a_tied_weight_of_which_vllm_changes_one_side_only_is_no_site():
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "pad_token_id": None}
    model = toys._small("CohereConfig", "CohereForCausalLM", **sizes, **heads, bos_token_id=1, eos_token_id=2)
    assert "model.embed_tokens" in places(model)
    assert "model.embed_tokens.weight" not in by_site(model)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_experts_cover_their_stacks_row_by_row(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    more = {"num_experts": 4, "num_local_experts": 4, "pad_token_id": 0}
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(**sizes, **heads, **more)
        )
    stacks = dict(model.named_parameters())
    found = [p for p in places(model).values() if p.expert is not None]
    assert len(found) == 4 * 3
    for site in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        covered = sum(p.shape[0] * p.shape[1] for p in found if p.site == site)
        assert covered == stacks[site].numel()


def test_a_classifier_is_its_language_model_with_another_head():
    assert outer_modules("LlamaForSequenceClassification") == {"embed_tokens"}
    assert outer_modules("Qwen2ForCausalLM") == frozenset()
    assert outer_modules("BertForSequenceClassification") is None
    assert (
        is_classifier("RobertaForSequenceClassification")
        and outer_modules("RobertaForSequenceClassification") == frozenset()
    )


def test_every_model_that_is_listed_is_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    from addenda.exporting.vllm.architectures import _KNOWN

    assert [name for name in _KNOWN if not hasattr(transformers, name)] == []
