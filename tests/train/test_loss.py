import pytest
import torch
import torch.nn.functional as F

from addenda.core.base.errors import AddendaError
from addenda.data.batches import Collator
from addenda.data.encode import IGNORE, encode
from addenda.data.read import read
from addenda.train import loss as module
from addenda.train.loss import keeps, score
from tiny_models import SUMS, make_bert, make_llama, make_llama_classifier, make_tokenizer


def a_batch():
    made = encode(read(SUMS), make_tokenizer())
    return Collator(made.pad, "causal")([made[i] for i in (0, 63, 9, 40)])


@pytest.mark.parametrize("how", ["mask", "positions", ""])
def test_the_loss_at_the_labels_is_the_loss_of_the_full_logits(monkeypatch, how):
    model, batch = make_llama(), a_batch()
    assert keeps(model) == "mask"
    monkeypatch.setattr(module, "keeps", lambda _: how)
    made = score(model, batch, "causal", right=True)
    model.zero_grad()
    made.mean.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    model.zero_grad()
    want = model(**batch).loss
    want.backward()
    assert abs(made.mean.item() - want.item()) < 1e-5
    torch.testing.assert_close(gradient, model.model.layers[0].self_attn.q_proj.weight.grad, atol=1e-6, rtol=1e-4)

    logits, labels = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1], batch["labels"]
    for i in range(4):
        own = F.cross_entropy(logits[i], labels[i, 1:], ignore_index=IGNORE)
        assert abs(made.means[i].item() - own.item()) < 1e-5
        keep = labels[i, 1:] != IGNORE
        assert made.right[i].item() == (logits[i].argmax(-1) == labels[i, 1:])[keep].all().item()
    assert made.counts.tolist() == [(row[1:] != IGNORE).sum().item() for row in labels]


def test_an_example_is_right_only_if_every_token_is():
    batch = a_batch()
    model = make_llama()
    labels = batch["labels"]

    class Oracle(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            logits = F.one_hot(torch.roll(labels, -1, 1).clamp(min=0), model.config.vocab_size).float()
            logits[1, -2] = 0  # the last token of example 1: its end
            return type("Output", (), {"logits": logits})

    assert score(Oracle(), batch, "causal", right=True).right.tolist() == [True, False, True, True]


@pytest.mark.parametrize("make", [make_bert, make_llama_classifier])
def test_classifiers(make):
    model = make()
    rows = [{"text": "ab", "label": "x"}, {"text": "abcde", "label": "y"}]
    made = encode(read(rows, task="label"), make_tokenizer())
    batch = Collator(made.pad, made.kind)([made[0], made[1]])
    found = score(model, batch, made.kind, right=True)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert found.mean.item() == pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), abs=1e-6)
    assert found.right.tolist() == (logits.argmax(-1) == batch["labels"]).tolist()


def test_values_are_fitted_by_squares():
    model = make_bert(labels=1)
    made = encode(read([{"text": "ab", "label": 0.5}, {"text": "c", "label": -1.0}], task="label"), make_tokenizer())
    batch = Collator(made.pad, made.kind)([made[0], made[1]])
    found = score(model, batch, made.kind, right=True)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, 0]
    assert found.mean.item() == pytest.approx(F.mse_loss(logits, batch["labels"]).item(), abs=1e-6)
    assert found.right is None
    with pytest.raises(AddendaError, match="num_labels=1"):
        score(make_bert(labels=2), batch, made.kind)


def test_labels_that_do_not_fit_the_model():
    made = encode(read([{"text": "ab", "label": 4}], task="label"), make_tokenizer())
    with pytest.raises(AddendaError, match="there is a label 4"):
        score(make_bert(), Collator(made.pad, made.kind)([made[0]]), "class")
    with pytest.raises(AddendaError, match="without logits"):
        score(make_llama().model, a_batch(), "causal")
