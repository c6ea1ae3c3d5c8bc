"""Names and orders of GGUF: against gguf's own table and llama.cpp's own formula."""

from types import SimpleNamespace

import gguf
import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.exporting.gguf.architectures import ARCHITECTURES, architecture_of, known
from gguf_base import KINDS, PERMUTED, make, permute


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_are_those_of_gguf(kind):
    a = ARCHITECTURES[kind]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[a.name.upper()], 12)
    paths = [f"{a.blocks}.{i}.{inside}" for i in (0, 3, 11) for inside in a.inside]
    paths += [a.embedding] if a.one_weight else [a.embedding, "lm_head"]
    assert [a.tensor(p) for p in paths] == [f"{table.get_name(p)}.weight" for p in paths]
    assert [a.path(a.tensor(p)) for p in paths] == paths


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_and_embedding_of_a_block_has_a_name(kind):
    model, a = make(kind), ARCHITECTURES[kind]
    layers = [p for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Embedding")]
    without = [p for p in layers if a.tensor(p) is None]
    assert without == (["transformer.wpe"] if kind == "gpt2" else [])
    assert len({a.tensor(p) for p in layers}) == len(layers)


def test_a_bare_body_has_the_names_of_the_model_around_it():
    a = ARCHITECTURES["llama"]
    assert a.tensor("layers.7.self_attn.k_proj") == a.tensor("model.layers.7.self_attn.k_proj") == "blk.7.attn_k.weight"
    assert a.tensor("embed_tokens") == "token_embd.weight"
    assert ARCHITECTURES["gpt2"].tensor("h.1.attn.c_attn") == "blk.1.attn_qkv.weight"


@pytest.mark.parametrize(
    "path",
    ["model.layers.0.input_layernorm", "model.layers.01.mlp.up_proj", "model.layers.0.mlp.up_proj.x", "model.norm", "",
     "score", "model.layers.x.mlp.up_proj", "vision.model.layers.0.mlp.up_proj"],
)  # fmt: skip
def test_what_has_no_name(path):
    assert ARCHITECTURES["llama"].tensor(path) is None


@pytest.mark.parametrize(
    "tensor",
    ["blk.0.attn_norm.weight", "blk.0.attn_q.bias", "blk.00.attn_q.weight", "blk.1e3.attn_q.weight",
     "blk..attn_q.weight", "blk.-1.attn_q.weight", "output_norm.weight", "blk.٣.attn_q.weight",
     "blk.9999999.attn_q.weight", ""],
)  # fmt: skip
def test_what_is_no_name(tensor):
    assert ARCHITECTURES["llama"].path(tensor) is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_of_q_and_k_stand_as_llama_cpp_turns_them(kind):
    config = SimpleNamespace(num_attention_heads=6, num_key_value_heads=2)
    rows = {"blk.0.attn_q.weight": (48, 6), "blk.5.attn_k.weight": (16, 2)}
    for tensor, (m, heads) in rows.items():
        W, order = torch.randn(m, 3), ARCHITECTURES[kind].order(tensor, m, config)
        assert (order is not None) == (kind in PERMUTED)
        if order is not None:
            assert torch.equal(W[order], permute(W, heads))
            assert not torch.equal(W[order], W)
    for tensor in ("blk.0.attn_v.weight", "blk.0.ffn_up.weight", "token_embd.weight", "output.weight"):
        assert ARCHITECTURES[kind].order(tensor, 48, config) is None


def test_as_many_heads_of_k_as_of_q_where_the_config_says_no_other():
    a, W = ARCHITECTURES["llama"], torch.randn(24, 2)
    assert torch.equal(W[a.order("blk.0.attn_k.weight", 24, SimpleNamespace(num_attention_heads=4))], permute(W, 4))


@pytest.mark.parametrize("heads", [5, 0, None, 24])
def test_an_order_that_cannot_be_told_is_an_error(heads):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=None)
    with pytest.raises(AddendaError, match="order of rows in GGUF cannot be told"):
        ARCHITECTURES["llama"].order("blk.0.attn_q.weight", 24, config)


def test_embedding_and_head_that_are_one_weight():
    untied, tied = SimpleNamespace(tie_word_embeddings=False), SimpleNamespace(tie_word_embeddings=True)
    for tensor in ("token_embd.weight", "output.weight"):
        assert ARCHITECTURES["llama"].tied(tensor, tied) and ARCHITECTURES["gemma"].tied(tensor, untied)
        assert not ARCHITECTURES["llama"].tied(tensor, untied)
    assert not ARCHITECTURES["llama"].tied("blk.0.attn_q.weight", tied)


def test_untried_models_are_refused_by_name():
    with pytest.raises(AddendaError, match=r"'mixtral' models were not tried .* Tried: llama, .*as 'merged'"):
        architecture_of(SimpleNamespace(model_type="mixtral"))
    with pytest.raises(AddendaError, match="no transformers config"):
        architecture_of(None)


def test_model_types_of_an_architecture():
    assert known("llama") == ["llama", "mistral"]
    assert known("gemma3") == ["gemma3_text"]
    assert known("mamba") == []
