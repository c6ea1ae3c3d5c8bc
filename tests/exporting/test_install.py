"""Attaching an adapter whose tensors are given."""

import pytest
import torch

import addenda as ad
from addenda import AddendaError
from addenda.core.state.state import find_state
from addenda.exporting.install import install
from addenda.methods.lora import LoRA
from shared import METHODS, NAMES, attach, same_bits, stir
from shared import bits as bits_of
from toys import make_llama

IDS = torch.arange(10)[None]
Q = "model.layers.0.self_attn.q_proj"


def given(adapter):
    return {path: (t.method, t.stored()) for path, t in adapter.sites()}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_can_be_installed_from_its_tensors(name):
    options = {"tie_word_embeddings": False, "attention_bias": True}
    model, other = make_llama(**options), make_llama(**options)
    targets = None if METHODS[name].targets != "linear" else "linear"
    adapter = stir(attach(model, name, IDS, targets=targets))
    pools = {m: dict(pool.stored()) for m, (_, pool) in zip(dict.fromkeys(adapter.methods.values()), adapter.pools(),
                                                            strict=False)}  # fmt: skip
    made = install(other, given(adapter), name="b", pools=pools, activate=True, seed=0)
    assert not any(p.requires_grad for p in made.parameters())
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in adapter.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, other.eval()(IDS).logits)
        assert not torch.equal(other(IDS).logits, make_llama(**options)(IDS).logits)
    ad.detach(other)
    assert same_bits(bits_of(other), bits_of(make_llama(**options)))


def test_tensors_are_copied_and_come_in_the_models_order():
    model = make_llama()
    A, B = torch.ones(2, 8), torch.ones(8, 2)
    forms = {p: (LoRA(rank=2), {"B": B, "A": A}) for p in ("model.layers.1.self_attn.q_proj", Q)}
    adapter = install(model, forms, name="a")
    A.zero_()
    assert [*adapter.methods] == [Q, "model.layers.1.self_attn.q_proj"]
    assert all(bool(t.A.all()) for _, t in adapter.sites()) and ad.status(model)


@pytest.mark.parametrize(
    ("forms", "said"),
    [
        ({}, "it has no site"),
        ({"model.layers.0.self_attn.q": (LoRA(rank=2), {})}, r"the model has no .*self_attn.q .*Did you mean"),
        ({Q: (LoRA(rank=2), {"A": torch.zeros(2, 8)})}, "expected 32 trained numbers, the file has 16"),
        ({Q: (LoRA(rank=2), {"A": torch.zeros(8, 2), "B": torch.zeros(2, 8)})}, r"expected .*A float \[2, 8\]"),
        ({Q: (LoRA(rank=2), {"A": torch.full((2, 8), torch.nan), "B": torch.zeros(8, 2)})}, "not finite"),
        ({Q: (LoRA(rank=99), {"A": torch.zeros(99, 8), "B": torch.zeros(8, 99)})}, r"rank 99 is above min\(8, 8\)"),
        ({"lm_head": (LoRA(rank=1), {"A": torch.zeros(1, 8), "B": torch.zeros(40, 1)}),
          "model.embed_tokens": (LoRA(rank=1), {"A": torch.zeros(1, 8), "B": torch.zeros(40, 1)})}, "tied"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_stays(forms, said):
    model = make_llama()
    before = bits_of(model)
    with pytest.raises(AddendaError, match=said):
        install(model, forms, name="a", what="The thing")
    assert find_state(model) is None and same_bits(before, bits_of(model))
    assert [*model.state_dict()] == [*make_llama().state_dict()]


def test_heads_are_trained_copies_and_belong_to_the_adapter():
    model = make_llama(tie_word_embeddings=False)
    value = torch.randn(model.lm_head.weight.shape)
    adapter = install(model, {Q: (LoRA(rank=2), {"A": torch.zeros(2, 8), "B": torch.zeros(8, 2)})}, name="a",
                      heads={"lm_head.weight": {"value": value}}, activate=True)  # fmt: skip
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        torch.testing.assert_close(model(IDS).logits, hidden @ value.T)
    assert ad.core.state.state.record_of(model, "a").record.also_train == ("lm_head.weight",)
    assert adapter.name == "a"
    with pytest.raises(AddendaError, match="called 'a' is attached"):
        install(model, {Q: (LoRA(rank=2), {})}, name="a")


def test_whole_numbers_where_a_method_trains_are_refused():
    model = make_llama()
    tensors = {"A": torch.ones(2, 32, dtype=torch.int32), "B": torch.ones(32, 2)}
    with pytest.raises(AddendaError, match=f"{Q}/A is int32"):
        install(model, {Q: (LoRA(rank=2), tensors)}, name="b")
    assert find_state(model) is None
