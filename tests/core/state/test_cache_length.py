"""What follows a call: chunks, turns and generation give what the whole sequence gives; no call sees another one's."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache

import addenda as ad
import toys
from addenda.core.state.cache_length import as_given, cache_names, cache_of
from shared import HIDDEN, METHODS, attach, stir

P, T = 3, 11
IDS = torch.arange(2 * T).reshape(2, T) * 5 % toys.VOCAB


def adapted(model, spec):
    adapter = ad.attach(model.double().eval(), f"{spec}:places={P}")
    torch.manual_seed(4)
    for p in adapter.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    return model


def hooks(model):
    return [hook for m in model.modules() for hook in [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]]


@pytest.mark.parametrize("spec", ["prefix", "prompt"])
@pytest.mark.parametrize("sizes", [(6, 5), (4, 4, 3), (2, 1, 8), (1,) * T])
def test_chunks_behind_a_cache_are_the_whole(spec, sizes):
    model = adapted(toys.make_llama(), spec)
    want = model(IDS).logits
    for call in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=T)):
            with torch.no_grad():
                parts = [call(ids, **as_given(model, cache), use_cache=True).logits for ids in IDS.split(sizes, 1)]
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
    assert len(hooks(model)) == 4, "before and behind the model and the one inside it"
    ad.detach(model, "default")
    assert len(hooks(model)) == 4
    ad.detach(model, "other")
    assert not hooks(model)
    ad.detach(model)


def test_a_cache_that_does_not_tell_its_length():
    """As where nothing is known of a cache: what is longer than the places is at its first token."""
    model = adapted(toys.make_llama(), "prompt")
    embed, silent = model.get_input_embeddings(), SimpleNamespace()
    found = {}

    class SeenError(Exception):
        pass

    def look(module, args, out):
        found[out.shape[1]] = out
        raise SeenError

    handle = embed.register_forward_hook(look)
    for ids in (IDS, IDS[:, :P]):
        with pytest.raises(SeenError):
            model(ids, **as_given(model, silent))
    handle.remove()
    ad.switch(model, None)
    plain = embed(IDS)
    changed = found[T] != plain
    assert changed[:, :P].all() and not changed[:, P:].any()
    assert torch.equal(found[P], plain[:, :P])


# -- state belongs to a call -------------------------------------------------------------------------------------------


def encoder_decoder(name: str) -> nn.Module:
    sizes = {"vocab_size": toys.VOCAB, "d_model": 8, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name == "T5":
        return toys._small(
            "T5Config", "T5ForConditionalGeneration", **sizes, d_ff=16, d_kv=4, num_layers=2, num_heads=2
        )
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    model = "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration"
    return toys._small(f"{name}Config", model, **sizes, max_position_embeddings=32, forced_eos_token_id=None)


@pytest.mark.parametrize(
    "spec", ["prefix:places=3", "prompt:places=3", "loreft:rank=2,first=2", "loreft:rank=2,last=2"]
)
@pytest.mark.parametrize("name", ["Bart", "Marian", "Pegasus", "M2M100", "MBart", "T5"])
def test_an_encoder_knows_nothing_of_the_request_before(name, spec):
    model = encoder_decoder(name).double()
    stir(ad.attach(model, spec), 2.0)
    model.double()
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    short, long = IDS[:1, :5], IDS + 3 * (IDS == 0)

    def requests(call):
        yield lambda: call.generate(long, **options)
        yield lambda: call.generate(short, **options)
        yield lambda: call.generate(long, num_beams=3, **options)
        yield lambda: call.generate(long, encoder_outputs=call.get_encoder()(long), **options)

    def encoded(call):
        return call.get_encoder()(long).last_hidden_state

    wanted = [request().scores[0] for request in requests(copy.deepcopy(model))]
    alone = encoded(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(2):
            for request, want in zip(requests(model), wanted, strict=True):
                torch.testing.assert_close(request().scores[0], want)
                torch.testing.assert_close(encoded(model), alone)
                cache = as_given(model, cache_of(model(long, decoder_input_ids=long[:, :4], use_cache=True)))
                with pytest.raises(IndexError):
                    model(long, decoder_input_ids=long[:, :1] + toys.VOCAB, **cache)


@pytest.mark.parametrize("spec", ["prefix", "prompt"])
def test_calls_in_turn_and_one_that_fails_halfway(spec):
    model = adapted(toys.make_llama(), spec)
    want, caches = model(IDS).logits, [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for ids, cache in zip((IDS[:1, :6], IDS[1:, :2]), caches, strict=True):
            model(ids, **as_given(model, cache), use_cache=True)
        failing = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS[:, :4])
        failing.remove()
        for i, (start, cache) in enumerate(zip((6, 2), caches, strict=True)):
            got = model(IDS[i : i + 1, start:], **as_given(model, cache), use_cache=True).logits
            torch.testing.assert_close(got, want[i : i + 1, start:])
    torch.testing.assert_close(model(IDS).logits, want)


def test_caches_are_known_by_name_and_by_class():
    class Named(nn.Module):
        def forward(self, ids, use_cache: bool = True, cache=None, cache_position=None): ...

    class Annotated(nn.Module):
        def forward(self, ids, memory: "DynamicCache | None" = None, cache_position: "torch.Tensor | None" = None): ...

    assert cache_names(Named()) == ["cache"]
    assert cache_names(Annotated()) == ["memory"]
    assert cache_names(toys.make_llama()) and not cache_names(nn.Linear(2, 2))


# -- padding -----------------------------------------------------------------------------------------------------------

ROWS = [IDS[0, :4] + 1, IDS[1, :7], IDS[0, 5:10]]
COUNTING = {
    "first": ad.LoReFT(rank=2, first=2),
    "last": ad.LoReFT(rank=2, last=2),
    "both": ad.LoReFT(rank=2, first=1, last=1),
}
EVERY = {**{name: METHODS[name] for name in HIDDEN}, **COUNTING}
every = pytest.mark.parametrize("name", EVERY)


def padded(side):
    mask = torch.zeros(len(ROWS), max(map(len, ROWS)), dtype=torch.long)
    for i, row in enumerate(ROWS):
        mask[i, slice(-len(row), None) if side == "left" else slice(len(row))] = 1
    ids = torch.zeros_like(mask)
    ids[mask == 1] = torch.cat(ROWS)
    return ids, mask


def stirred(model, name):
    stir(attach(model, EVERY[name]), 0.7)
    return model.double()


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_example_is_the_same_alone_and_beside_longer_ones(name, side):
    ids, mask = padded(side)
    for model in (toys.make_llama(), toys.make_t5().encoder):
        stirred(model, name)

        def out(ids, mask, model=model):
            return model(ids, attention_mask=mask)[0]

        together = out(ids, mask)
        for i, row in enumerate(ROWS):
            torch.testing.assert_close(together[i][mask[i] == 1], out(row[None], None)[0])


@every
def test_greedy_generation_is_the_same_alone_and_beside_longer_ones(name):
    model, (ids, mask) = stirred(toys.make_llama(), name), padded("left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ways = [{}, {"use_cache": False}]
    ways += [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}] if name in (*COUNTING, "prefix") else []
    for way in ways:
        together = model.generate(ids, attention_mask=mask, **options, **way)[:, ids.shape[1] :]
        for answer, row in zip(together, ROWS, strict=True):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **options, **way)
            assert torch.equal(answer, alone[0, len(row) :]), way


@pytest.mark.parametrize("name", [*COUNTING, "prefix", "prompt"])
def test_rows_of_a_padded_batch_through_adapters_of_their_own(name):
    model, (ids, mask) = stirred(toys.make_llama(), name), padded("left")
    together = model(ids, attention_mask=mask).logits
    with ad.disabled(model):
        base = model(ids, attention_mask=mask).logits
    with ad.per_example(model, [None, "default", "default"]):
        mixed = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(mixed, torch.cat([base[:1], together[1:]]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*COUNTING, "prefix", "prompt"])
def test_what_is_computed_again_in_backward_knows_the_padding_of_its_forward(name, reentrant):
    model, (ids, mask) = stirred(toys.make_llama(), name).train(), padded("left")
    parameters = ad.adapters(model)["default"].parameters()

    def losses():
        return [
            model(i, attention_mask=m, use_cache=False).logits[:, -1].square().sum() * w
            for i, m, w in ((ids, mask, 1), (ids.roll(1, 0), mask.roll(1, 0), 3), (ids[1:2], None, 1))
        ]

    want = torch.autograd.grad(sum(losses()), parameters)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    sum(losses()).backward()
    torch.testing.assert_close([p.grad for p in parameters], list(want))


@pytest.mark.parametrize("name", [*COUNTING, "prefix"])
def test_a_users_own_checkpoint_knows_the_padding_of_its_forward(name):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.llama = stirred(toys.make_llama(), name)

        def forward(self, ids, mask):
            embedded = self.llama.get_input_embeddings()(ids)
            return checkpoint(
                lambda e: self.llama(inputs_embeds=e, attention_mask=mask)[0], embedded, use_reentrant=False
            )

    model, (ids, mask) = Whole(), padded("left")
    parameters = ad.adapters(model)["default"].parameters()
    want = torch.autograd.grad(model.llama(ids, attention_mask=mask)[0].square().sum(), parameters)
    got = torch.autograd.grad(model(ids, mask).square().sum(), parameters)
    torch.testing.assert_close(got, want)


def test_a_model_of_ones_own_and_masks_that_cannot_be_used():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, x, attention_mask=None):
            return self.layers[0](x)

    (_, mask), x, model = padded("left"), torch.zeros(3, 7, 4), nn.ModuleDict({"own": Own(), "lin": nn.Linear(4, 4)})
    stir(ad.attach(model, ad.LoReFT(rank=2, first=1, last=2), targets="own.layers.0"), 0.5)
    edited = (model["own"](x, mask) != 0).any(-1)
    assert edited.int().tolist() == [[0, 0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 1, 1]]
    edited = (model["own"](x, mask[:, :5]) != 0).any(-1)  # a model that has made its input longer
    assert edited.int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]]
    with pytest.raises(ad.AddendaError, match=r"The attention mask is a object.*counts tokens"):
        model["own"](x, object())
    with pytest.raises(ad.AddendaError, match=r"mask is \(2, 7\).*as many examples"):
        model["own"](x, mask[:2])
    assert (model["own"](x) != 0).any(-1).sum() == 9
