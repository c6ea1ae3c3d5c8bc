"""A discriminator beside a source adapter: it learns, judges texts as a written-out loop does, and changes nothing."""

import math

import pytest
import torch

import addenda as ad
import tiny_models
from addenda.transferring.discriminator import fit_discriminator, kept

TOKENIZER = tiny_models.make_tokenizer()
REAL = [f"{a}+{b}=?" for a in range(6) for b in range(5)]
MADE = [f"{x}{y} is{z}" for x in "abc" for y in "def" for z in "xyz"]
HOW = {"name": "sums", "answers": ("y", "n"), "steps": 24, "batch": 12, "rate": 1e-2}


def make_model():
    """A tiny model whose weights are large enough that it attends to what stands before."""
    model = tiny_models.make_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def fitted():
    """A model with a source adapter, which acts, and a discriminator beside it; what the source gave before."""
    model = make_model()
    ad.attach(model, "lora:rank=2", name="source")
    for p in ad.adapters(model)["source"].parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.tensor([TOKENIZER(REAL[0])["input_ids"]])
    before = model(ids).logits.detach()
    found = fit_discriminator(model, TOKENIZER, REAL, [*MADE, REAL[3]], method="lora:rank=8", seed=1, **HOW)
    return model, found, ids, before


def test_it_tells_inputs_from_made_ones_and_the_source_adapter_acts_as_before(fitted):
    model, found, ids, before = fitted
    assert found.accuracy > 0.9 and found.held == 6 + 5 and found.dropped == 1 and 0 < found.steps <= 24
    assert found.name == "sums" and found.adapter == "discriminator"
    assert torch.equal(model(ids).logits, before)
    assert not any(p.requires_grad for p in ad.adapters(model)["discriminator"].parameters())
    assert "source: active" in ad.status(model) and "discriminator: idle" in ad.status(model)


def test_margins_are_those_of_each_text_alone(fitted):
    model, found, ids, before = fitted
    texts = ["3+3=?", "a", "be is", "1+1=? and more", "9+9=?"]
    expected = []
    ad.switch(model, "discriminator")
    for text in texts:
        logits = model(torch.tensor([found.wording.ids(TOKENIZER, text)])).logits[0, -1]
        expected.append((logits[found.wording.tokens[0]] - logits[found.wording.tokens[1]]).item())
    ad.switch(model, "source")
    assert found.margins(model, TOKENIZER, texts) == pytest.approx(expected, abs=1e-4)
    assert found.margins(model, TOKENIZER, texts, batch=2) == pytest.approx(expected, abs=1e-4)
    assert found.margins(model, TOKENIZER, texts[:1]) == pytest.approx(expected[:1], abs=1e-4)
    assert found.margins(model, TOKENIZER, []) == []
    assert torch.equal(model(ids).logits, before)


def test_margins_that_are_no_numbers_are_told(fitted):
    model, found, _, _ = fitted
    kept_weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ad.AddendaError, match=r"not finite for 2 of 2 texts.*float32"):
        found.margins(model, TOKENIZER, ["1+1=?", "a"])
    with torch.no_grad():
        model.lm_head.weight.copy_(kept_weight)


def test_another_method_may_be_the_discriminator():
    model = tiny_models.make_llama()
    found = fit_discriminator(model, TOKENIZER, REAL[:8], MADE[:8], method="ia3", **HOW | {"steps": 2})
    assert ad.adapters(model)["discriminator"].kinds == "ia3" and found.steps in (1, 2)


def test_what_cannot_be_fitted_leaves_the_model_alone():
    model = tiny_models.make_llama()
    with pytest.raises(ad.AddendaError, match="3 different inputs"):
        fit_discriminator(model, TOKENIZER, [*REAL[:3], REAL[0]], MADE, **HOW)
    with pytest.raises(ad.AddendaError, match="3 different negatives"):
        fit_discriminator(model, TOKENIZER, REAL, [*MADE[:3], REAL[0]], **HOW)
    with pytest.raises(ad.AddendaError, match="held_share must be"):
        fit_discriminator(model, TOKENIZER, REAL, MADE, held_share=1.0, **HOW)
    with pytest.raises(ad.AddendaError, match="no method"):
        fit_discriminator(model, TOKENIZER, REAL, MADE, method="lorra", **HOW)

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_discriminator(model, TOKENIZER, REAL, MADE, progress=stop, **HOW)
    assert ad.status(model) == "LlamaForCausalLM: no adapter attached"
    assert all(p.requires_grad for p in model.parameters())


def test_the_filter_is_idempotent_and_monotone():
    margins = torch.randn(200, generator=torch.Generator().manual_seed(3)).tolist()
    assert kept(margins) == [i for i, m in enumerate(margins) if m > 0]
    for threshold in (-0.5, 0.0, 0.7, None):
        for top in (None, 0, 7, 500):
            once = kept(margins, threshold, top)
            assert kept([margins[i] for i in once], threshold, top) == list(range(len(once)))
            assert once == sorted(once)
    assert {*kept(margins, 0.7)} < {*kept(margins, 0.0)} < {*kept(margins, -0.5)}
    best = kept(margins, None, 5)
    assert {margins[i] for i in best} == {*sorted(margins)[-5:]}
    assert kept([1.0, 2.0, 1.0], top=2) == [0, 1] and kept([-2.0, -1.0], top=1) == []


def test_the_filter_refuses_what_is_no_margin():
    for wrong in (math.nan, math.inf):
        with pytest.raises(ad.AddendaError, match="1 are none, the first at 1"):
            kept([1.0, wrong])
    with pytest.raises(ad.AddendaError, match="top="):
        kept([1.0], top=-1)
