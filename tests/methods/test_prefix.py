"""Prefix tuning: the examples see what they would see beside a cache of other keys and values in the plain model."""

import pytest
import torch
from transformers import DynamicCache

import addenda as ad
import toys
from addenda.core.state.cache_length import as_given, cache_of

P, T = 3, 5
IDS = torch.arange(2 * (P + T)).reshape(2, P + T) * 5 % toys.VOCAB


def prefixed(model):
    adapter = ad.attach(model.double().eval(), ad.Prefix(places=P))
    torch.manual_seed(4)
    for p in adapter.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    return adapter


def test_the_plain_model_beside_trained_keys_and_values():
    model = toys.make_llama()
    plain = model.double()(IDS).logits
    adapter = prefixed(model)
    out = model(IDS, use_cache=True)
    pairs = [(k[:, :, :P].detach(), v[:, :, :P].detach()) for k, v, *_ in cache_of(out)]
    ad.detach(model)
    want = model(IDS[:, P:], **as_given(model, DynamicCache(pairs))).logits
    torch.testing.assert_close(out.logits[:, P:], want)
    assert (out.logits - plain).abs().max() > 1e-2
    assert adapter.name == "default"


def test_keys_and_values_are_free():
    """In a causal model any pair can be reached: the offset to it does not depend on the example."""
    model = toys.make_llama()
    adapter = prefixed(model)
    site = dict(adapter.sites())["model.layers.1.self_attn.k_proj@output"]
    layer = model.model.layers[1].self_attn.k_proj
    seen = []
    layer.register_forward_hook(lambda m, args, y: seen.append(y[:, :P]))
    ids = IDS.clone()
    ids[:, :P] = IDS[0, :P]
    model(ids)
    torch.testing.assert_close(seen[-1][0], seen[-1][1])
    wanted = torch.randn_like(seen[-1][0])
    site._parameters["offset"].data += wanted - seen[-1][0]
    model(ids)
    torch.testing.assert_close(seen[-1], wanted.expand_as(seen[-1]))


def test_labels_of_an_encoder_and_decoder_have_no_places():
    model = toys.make_t5().double().eval()
    hidden = model.encoder(IDS).last_hidden_state
    adapter = prefixed(model)
    model.train()
    model(input_ids=IDS, labels=IDS[:, :P].contiguous()).loss.backward()
    assert all(p.grad.any() for p in adapter.parameters())
    model.eval()
    assert not torch.equal(model.encoder(IDS).last_hidden_state, hidden)
    at_decoder = {"decoder_input_ids": IDS, "encoder_outputs": (hidden,)}
    got = model(**at_decoder).logits
    ad.detach(model)
    torch.testing.assert_close(model(**at_decoder).logits, got)  # the decoder, and how it reads the encoder


def test_places_and_counts():
    plan = ad.plan(toys.make_t5(), "prefix:places=4")
    assert [r.path.rpartition(".")[2] for r in plan.rows] == ["k@output", "v@output"] * 2, "the encoder's"
    assert plan.trainable == 4 * 4 * 8
    with pytest.raises(ad.AddendaError, match=r"h\.0 has no layer for each key alone"):
        ad.plan(toys.make_gpt2(), "prefix")
