"""NICE couplings at the embeddings: their inverse, where it is put, and the model between the two."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import addenda as ad
import toys
from shared import read_raw, write_raw

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def moved(model, **options):
    adapter = ad.attach(model.double().eval(), ad.Invertible(**options))
    torch.manual_seed(4)
    for p in adapter.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64) * 0.5
    ((path, tensors),) = adapter.sites()
    return path, dict(tensors._parameters)


def couple(p, e, sign=1):
    """The coupling written out; sign = −1 is its inverse, taken backwards."""

    def net(k, u):
        return torch.relu(u @ p[f"{k}_down"].T + p[f"{k}_down_bias"]) @ p[f"{k}_up"].T + p[f"{k}_up_bias"]

    a, b = e[..., :4], e[..., 4:]
    if sign > 0:
        a = a + net("F", b)
        b = b + net("G", a)
    else:
        b = b - net("G", a)
        a = a - net("F", b)
    return torch.cat([a, b], -1)


def test_the_inverse_is_one():
    _, p = moved(toys.make_llama(), rank=3)
    method, e = ad.Invertible(rank=3), torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(method.change(e, e, p), couple(p, e))
    torch.testing.assert_close(method.undo(method.change(e, e, p), p), e)
    torch.testing.assert_close(method.undo(e, p), couple(p, e, -1))
    assert (couple(p, e) - e).abs().max() > 0.1


@pytest.mark.parametrize("make", [toys.make_llama, toys.make_gpt2])
def test_changed_behind_the_embeddings_and_undone_before_the_head(make):
    model = make()
    path, p = moved(model)
    assert (
        path
        == {"make_llama": "model.embed_tokens@output~lm_head", "make_gpt2": "transformer.wte@output~lm_head"}[
            make.__name__
        ]
    )
    got = model(IDS).logits
    leaves = list(p.values())
    grads = torch.autograd.grad(got.square().sum(), leaves)
    ad.switch(model, None)
    e = couple(p, model.get_input_embeddings()(IDS))
    body = model.base_model(inputs_embeds=e).last_hidden_state
    want = model.lm_head(couple(p, body, -1))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want.square().sum(), leaves))


def test_an_encoder_and_a_decoder_have_one_each_and_the_last_is_undone():
    model = toys.make_t5().double().eval()
    adapter = ad.attach(model, "invertible")
    torch.manual_seed(4)
    for q in adapter.parameters():
        q.data = torch.randn(q.shape, dtype=torch.float64) * 0.5
    encoder, decoder = (dict(t._parameters) for _, t in adapter.sites())
    heads, hook = [], model.lm_head.register_forward_pre_hook(lambda m, args: heads.append(args[0]))
    got = model(input_ids=IDS, decoder_input_ids=IDS).logits
    ad.switch(model, None)
    e = model.get_input_embeddings()(IDS)
    model(inputs_embeds=couple(encoder, e), decoder_inputs_embeds=couple(decoder, e))
    hook.remove()
    torch.testing.assert_close(got, model.lm_head(couple(decoder, heads[-1], -1)))


def test_around_the_whole_stem_of_bert_and_before_its_output_embedding(tmp_path):
    sizes = {"vocab_size": toys.VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))
    plain = model.double().eval()(IDS).logits
    adapter = ad.attach(model, "invertible")
    assert list(adapter.methods) == ["bert.embeddings@output~cls.predictions.decoder"]
    assert torch.equal(model(IDS).logits, plain), "an exact start"
    ad.detach(model)
    _, p = moved(model)
    got = model(IDS).logits
    file = ad.adapters(model)["default"].save(tmp_path / "a.safetensors")
    ad.switch(model, None)
    assert torch.equal(model(IDS).logits, plain)
    e = couple(p, model.bert.embeddings(input_ids=IDS))
    for layer in model.bert.encoder.layer:
        e = layer(e)
    head = model.cls.predictions
    torch.testing.assert_close(got, head.decoder(couple(p, head.transform(e), -1)))
    whole = model.cls(couple(p, e, -1))
    ad.detach(model)
    assert torch.equal(model(IDS).logits, plain)
    ad.load(model, file)
    torch.testing.assert_close(model(IDS).logits, got)
    ad.detach(model)
    header, tensors = read_raw(file)
    (site,) = header["sites"]
    new, site["path"] = site["path"], "bert.embeddings@output~cls"  # as earlier versions wrote it
    write_raw(file, header, {k.replace(new, site["path"]): t for k, t in tensors.items()})
    ad.load(model, file)
    torch.testing.assert_close(model(IDS).logits, whole)


def test_a_classifier_has_nothing_to_undo_it_before():
    path, _ = moved(toys.make_bert())
    assert path == "bert.embeddings@output"


def test_under_a_stack_the_last_is_undone_first():
    model = toys.make_llama()
    for name in "ab":
        adapter = ad.attach(model.double(), "invertible", name=name)
        torch.manual_seed(ord(name))
        for p in adapter.parameters():
            p.data = torch.randn(p.shape, dtype=torch.float64) * 0.5
    p = {n: dict(next(t for _, t in a.sites())._parameters) for n, a in ad.adapters(model).items()}
    ad.switch(model, ["a", "b"])
    got = model(IDS).logits
    with ad.composed(model, ad.Stack("a", "b")):
        torch.testing.assert_close(model(IDS).logits, got)
    with ad.composed(model, ad.Average("a", "b")), pytest.raises(ad.AddendaError, match="mean of inverses"):
        model(IDS)
    with ad.per_example(model, ["a", None]):
        rows = model(IDS).logits
    for i, name in enumerate(["a", None]):
        ad.switch(model, name)
        torch.testing.assert_close(rows[i : i + 1], model(IDS[i : i + 1]).logits)
    ad.switch(model, None)
    e = couple(p["b"], couple(p["a"], model.get_input_embeddings()(IDS)))
    h = model.base_model(inputs_embeds=e).last_hidden_state
    torch.testing.assert_close(got, model.lm_head(couple(p["a"], couple(p["b"], h, -1), -1)))


def test_counts_and_bad_widths():
    assert ad.Invertible().trainable(768) == 4 * 192 * 384 + 2 * (192 + 384)
    assert ad.Invertible().check(7) == "a width of 7 has no two equal halves to couple"
    with pytest.raises(ad.AddendaError, match="rank 5 is above half the width 8"):
        ad.attach(toys.make_llama(), "invertible:rank=5")
