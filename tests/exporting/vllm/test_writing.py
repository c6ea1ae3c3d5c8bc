"""What is written for vLLM: names, ranks, scales; and what is refused before anything is written."""

import json

import pytest
import torch
from bench.served import llama, moved
from safetensors.torch import load_file

import addenda as ad
import toys
from addenda.core.site.site import site_at
from addenda.exporting.pairs import low_rank
from addenda.exporting.vllm import RANKS, read, route
from addenda.exporting.vllm.writing import padded

MIXED = {"attention": ad.LoRA(rank=2, alpha=6, scaling="rs"), "mlp": ad.LoRA(rank=3, alpha=2)}


def contents(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def product(tensors, path):
    return tensors[f"base_model.model.{path}.lora_B.weight"] @ tensors[f"base_model.model.{path}.lora_A.weight"]


@pytest.mark.parametrize("uniform", [False, True])
def test_scales_are_folded_in_and_ranks_stand_under_whole_paths(llama, tmp_path, uniform):
    adapter = moved(ad.attach(llama, MIXED, name="a"))
    changes = {path: t.method.delta(site_at(llama, path).matrix, t.tensors()) for path, t in adapter.sites()}
    ad.export(adapter, "vllm", tmp_path / "out", uniform=uniform)
    config, tensors = contents(tmp_path / "out")
    assert config["use_rslora"] is False and config["bias"] == "none" and config["modules_to_save"] is None
    for path, change in changes.items():
        rank = tensors[f"base_model.model.{path}.lora_A.weight"].shape[0]
        assert config["rank_pattern"].get(path, config["r"]) == rank
        assert config["alpha_pattern"].get(path, config["lora_alpha"]) == rank  # so the scale is 1
        torch.testing.assert_close(product(tensors, path), change, rtol=1e-5, atol=1e-7)
    if uniform:
        assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] in RANKS


def test_padding_leaves_the_product_as_it_is(llama):
    pair = next(iter(low_rank(moved(ad.attach(llama, ad.LoRA(rank=3), name="a"))).values()))
    more = padded(pair, 8)
    assert more.rank == 8 and torch.equal(more.B @ more.A, pair.B @ pair.A)


def test_an_embedding_that_is_the_head_is_written_as_both(tmp_path):
    model = toys.make_llama()
    adapter = moved(ad.attach(model, ad.LoRA(rank=3), targets="model.embed_tokens.weight", name="a"))
    ad.export(adapter, "vllm", tmp_path / "out")
    _, tensors = contents(tmp_path / "out")
    at = "base_model.model.model.embed_tokens.lora_embedding_"
    embedded = (tensors[f"{at}B"] @ tensors[f"{at}A"]).T
    torch.testing.assert_close(embedded, product(tensors, "lm_head"))
    assert list(read(tmp_path / "out", model).sites) == ["model.embed_tokens.weight"]


def test_experts_are_written_one_by_one_with_zeros_where_nothing_changes(mixtral, tmp_path):
    adapter = moved(ad.attach(mixtral, ad.LoRA(rank=2, alpha=5), targets="*.0.mlp.experts.gate_up_proj", name="a"))
    pair = next(iter(low_rank(adapter).values()))
    ad.export(adapter, "vllm", tmp_path / "out")
    _, tensors = contents(tmp_path / "out")
    for e, change in enumerate(pair.B @ pair.A):
        at = f"model.layers.0.block_sparse_moe.experts.{e}"
        torch.testing.assert_close(product(tensors, f"{at}.w1"), change[:16])  # gate
        torch.testing.assert_close(product(tensors, f"{at}.w3"), change[16:])  # up
        assert not product(tensors, f"{at}.w2").any()
    assert not [k for k in tensors if "layers.1" in k]
    assert list(read(tmp_path / "out", mixtral).sites) == list(adapter.methods)


def test_a_classifiers_head_goes_along(tmp_path):
    model = llama_classifier()
    adapter = moved(ad.attach(model, ad.LoRA(rank=2), also_train=["score"], name="a"))
    ad.export(adapter, "vllm", tmp_path / "out")
    config, tensors = contents(tmp_path / "out")
    assert config["modules_to_save"] == ["score"]
    trained = next(t for path, t in adapter.sites() if path == "score.weight").tensors()["value"]
    assert torch.equal(tensors["base_model.model.score.weight"], trained)


def llama_classifier():
    return llama("LlamaForSequenceClassification", num_labels=3)


def qwen2():
    sizes = {"vocab_size": toys.VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return toys._small("Qwen2Config", "Qwen2ForCausalLM", **sizes, **heads)


REFUSED = {
    "a norm": (toys.make_llama, {"linear": ad.LoRA(rank=2), "model.norm.weight": ad.LNTuning()}, {}, "norm"),
    "activations": (toys.make_llama, {"mlp": ad.IA3Output()}, {}, "activations"),
    "a language model's head": (llama, {"attention": ad.LoRA(rank=2)}, {"also_train": ["lm_head"]}, "lm_head"),
    "an embedding of a model without": (qwen2, {"model.embed_tokens": ad.LoRA(rank=2)}, {}, "embed_tokens"),
    "a router": (toys.make_mixtral, {"*.gate.weight": ad.LoRA(rank=2)}, {}, "gate"),
    "a model without LoRA": (toys.make_bert, {"attention": ad.LoRA(rank=2)}, {}, "BertForSequence"),
    "no language model": (toys.make_vit, {"attention": ad.LoRA(rank=2)}, {}, "ViTForImage"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "methods", "options", "named"), REFUSED.values(), ids=REFUSED)
def test_what_vllm_would_not_serve_is_refused_by_name_and_nothing_is_written(tmp_path, make, methods, options, named):
    adapter = moved(ad.attach(make(), methods, name="a", **options))
    with pytest.raises(ad.AddendaError, match=named):
        ad.export(adapter, "vllm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_above_what_the_engine_starts_with_is_refused_with_the_way_out(tmp_path):
    adapter = moved(ad.attach(llama(), ad.LoRA(rank=12), name="a"))
    with pytest.raises(ad.AddendaError, match=r"rank 12, above max_lora_rank=8; give rank=8"):
        ad.export(adapter, "vllm", tmp_path / "out", max_lora_rank=8)
    assert list(tmp_path.iterdir()) == []
    report = ad.export(adapter, "vllm", tmp_path / "out", max_lora_rank=8, rank=8)
    assert not report.exact and max(report.errors.values()) < 1


def test_routes_say_what_becomes_of_a_method():
    model = toys.make_gpt2()
    conv1d = site_at(model, "transformer.h.0.attn.c_attn")
    linear = site_at(llama(), "model.layers.0.self_attn.q_proj")
    assert route(ad.LoRA(rank=2), linear).kind == "exact"
    assert route(ad.OFT(), linear).kind == "approximate"
    assert route(ad.LoRA(rank=2), conv1d).kind == "refused"
