"""What follows a cache: chunks, turns and generation give what the whole sequence gives."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

import addenda as ad
import toys

P, T = 3, 11
IDS = torch.arange(2 * T).reshape(2, T) * 5 % toys.VOCAB


def adapted(model, spec):
    adapter = ad.attach(model.double().eval(), f"{spec}:places={P}")
    torch.manual_seed(4)
    for p in adapter.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    return model


def hooks(model):
    return [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]


@pytest.mark.parametrize("spec", ["prefix", "prompt"])
@pytest.mark.parametrize("sizes", [(6, 5), (4, 4, 3), (2, 1, 8), (1,) * T])
def test_chunks_behind_a_cache_are_the_whole(spec, sizes):
    model = adapted(toys.make_llama(), spec)
    want = model(IDS).logits
    for call in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=T)):
            with torch.no_grad():
                parts = [call(ids, past_key_values=cache, use_cache=True).logits for ids in IDS.split(sizes, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), want)


@pytest.mark.parametrize("spec", ["prefix", "prompt"])
def test_generation_in_every_way_is_that_without_a_cache(spec):
    model = adapted(toys.make_llama(), spec)
    ids, options = IDS[:1], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, use_cache=False, **options)
    for more in ({}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **options, **more), want), more


def test_a_decoder_has_its_own_places():
    model = adapted(toys.make_t5(), "prefix")
    options = {"max_new_tokens": 6, "do_sample": False}
    got = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(got, model.generate(IDS, use_cache=False, **options))
    whole = model(input_ids=IDS, decoder_input_ids=got).logits
    assert torch.equal(whole[:, :-1].argmax(-1), got[:, 1:])


def test_nothing_stays_on_the_model():
    model = adapted(toys.make_llama(), "prefix")
    ad.attach(model, "prompt", name="other")
    ad.attach(model, "houlsby:rank=2", name="third")
    assert len(hooks(model)) == 2, "the model and the one inside it"
    ad.detach(model, "default")
    assert len(hooks(model)) == 2
    ad.detach(model, "other")
    assert not hooks(model)
    ad.detach(model)


def test_a_cache_that_does_not_tell_its_length():
    """As before a cache is known of: what is longer than the places is at its first token."""
    model = adapted(toys.make_llama(), "prompt")
    embed = model.get_input_embeddings()
    silent = SimpleNamespace()
    for hook in hooks(model):
        hook(model, (), {"past_key_values": silent})
    ad.switch(model, None)
    plain = embed(IDS)
    ad.switch(model, "default")
    changed = embed(IDS) != plain
    assert changed[:, :P].all() and not changed[:, P:].any()
    assert torch.equal(embed(IDS[:, :P]), plain[:, :P])
