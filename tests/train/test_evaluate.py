import pytest

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.train.generate import generate
from tiny_models import SUMS, make_llama, make_tokenizer


@pytest.mark.parametrize("template", [True, False])
def test_right_is_what_generate_writes(template):
    """On a model that has learned part of the task, with batches of unequal lengths."""
    tokenizer = make_tokenizer() if template else make_tokenizer(None)
    data = read(SUMS[:40])
    encoded = encode(data, tokenizer)
    model = make_llama()
    adapter = ad.attach(model, ad.LoRA(rank=16), targets="linear", also_train=["lm_head"])
    fit(model, adapter, encoded, steps=60, batch=20, rate=1e-2)
    made = evaluate(model, tokenizer, data, batch=7)
    answers = generate(model, tokenizer, [e.question for e in data.examples], max_new_tokens=8, batch=9)
    written = [int(a == e.answer) for a, e in zip(answers, data.examples, strict=True)]
    assert written == made.items
    assert 0 < made.accuracy < 1
    assert made.accuracy == sum(made.items) / 40
    assert evaluate(model, examples=encoded, batch=40).items == made.items
    assert evaluate(model, examples=encoded).loss == pytest.approx(made.loss, rel=1e-4)


def test_evaluation_changes_nothing():
    import torch

    model, encoded = make_llama(), encode(read(SUMS[:4]), make_tokenizer())
    model.train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    evaluate(model, examples=encoded)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.model.layers[0].training


def test_what_cannot_be():
    with pytest.raises(AddendaError, match="wants a tokenizer"):
        evaluate(make_llama(), examples=SUMS)
