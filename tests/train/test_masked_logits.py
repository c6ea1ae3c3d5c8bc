"""A masked LM's logits at the hidden places and over a table equal those columns of all its logits, adapters or not."""

import pytest
import torch
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.train.loss import score
from addenda.train.masked_logits import logits_at
from tiny_models import config

IGNORE = -100


def bert():
    return transformers.BertForMaskedLM(config(transformers.BertConfig))


def other(kind, **options):
    return lambda: getattr(transformers, f"{kind}ForMaskedLM")(
        config(getattr(transformers, f"{kind}Config"), **options)
    )


MODELS = {
    "bert": bert,
    "roberta": other("Roberta"),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=76, dim=32, n_layers=2, n_heads=2, hidden_dim=64, pad_token_id=0)
    ),
    "modernbert": other("ModernBert"),
    "electra": other("Electra", embedding_size=16),
    "albert": other("Albert", embedding_size=16),
    "deberta": other("DebertaV2"),
}


def batch(seed=0):
    torch.manual_seed(seed)
    ids, mask = torch.randint(5, 70, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[2, 7:] = 0
    seen = (torch.rand(3, 12) < 0.3) & (mask == 1)
    seen[:, 1] = True
    table = torch.tensor(sorted({*ids[seen].tolist(), 3, 40, 71}))
    return {"input_ids": ids, "attention_mask": mask}, seen, table


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_they_are_columns_of_all_logits_at_those_places(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    inputs, seen, table = batch()
    wanted = model(**inputs).logits[seen]
    assert torch.allclose(logits_at(model, inputs, seen), wanted, atol=1e-5)
    assert torch.allclose(logits_at(model, inputs, seen, table), wanted[:, table], atol=1e-5)
    assert torch.equal(model(**inputs).logits[seen], wanted)  # nothing is left on the model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method", "targets"),
    [
        ("pfeiffer:rank=8", None),
        ("invertible", None),
        ("lora:rank=2", "linear"),
        ("lora:rank=2", "cls.predictions.decoder.weight"),
        ("bitfit", None),
        ("bitfit", "cls.predictions.decoder.bias"),
        ("full", "word_embeddings"),
    ],
)
@torch.no_grad()
def test_adapters_act_before_and_inside_of_the_head(method, targets, tied):
    if tied and targets == "word_embeddings":
        targets = "bert.embeddings.word_embeddings.weight"
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config(transformers.BertConfig, tie_word_embeddings=tied)).eval()
    inputs, seen, table = batch()
    plain = model(**inputs).logits[seen]
    adapter = ad.attach(model, method, targets=targets)
    for p in adapter.parameters():
        p.add_(torch.randn_like(p) * 0.3)
    wanted = model(**inputs).logits[seen]
    assert not torch.allclose(wanted, plain, atol=1e-3)
    assert torch.allclose(logits_at(model, inputs, seen, table), wanted[:, table], atol=1e-5)


def test_head_and_table_see_no_more_than_they_must():
    model, (inputs, seen, table) = bert(), batch()
    shapes = {}
    for path in ("cls.predictions.transform.dense", "cls.predictions.decoder"):
        model.get_submodule(path).register_forward_hook(
            lambda m, a, y, path=path: shapes.update({path: tuple(y.shape)})
        )
    logits_at(model, inputs, seen, table)
    n = int(seen.sum())
    assert shapes == {
        "cls.predictions.transform.dense": (1, n, 32),
        "cls.predictions.decoder": (n, len(table)),
    }


def test_the_loss_and_its_gradient_are_those_of_a_dense_softmax_over_the_table():
    model, (inputs, seen, table) = bert().eval(), batch()
    places = torch.randint(0, len(table), (int(seen.sum()),))
    labels = torch.full(seen.shape, IGNORE)
    labels[seen] = places
    model.requires_grad_(False)
    adapter = ad.attach(model, "pfeiffer:rank=8")
    made = score(model, inputs | {"labels": labels, "table": table}, "masked", right=True)
    dense = model(**inputs).logits[seen].double()[:, table].log_softmax(-1)
    wanted = -dense[torch.arange(len(places)), places]
    assert made.count == len(places) and made.total.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    rows = seen.nonzero()[:, 0]
    assert made.sums.tolist() == pytest.approx([wanted[rows == i].sum().item() for i in range(3)], rel=1e-5)
    assert made.right.tolist() == [bool((dense.argmax(-1) == places)[rows == i].all()) for i in range(3)]
    got = torch.autograd.grad(made.total, adapter.parameters(), allow_unused=True)
    true = torch.autograd.grad(wanted.sum(), adapter.parameters(), allow_unused=True)
    for a, b in zip(got, true, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))


def test_a_model_without_logits_is_told():
    model, (inputs, seen, table) = transformers.BertModel(config(transformers.BertConfig)), batch()
    with pytest.raises(AddendaError, match="without logits"):
        logits_at(model, inputs, seen, table)
