"""The consistency term against its definition, and a run with it: resumable, in parts, refused where it is nothing."""

import pytest
import torch
import torch.nn.functional as F
from tests.train.test_trainer import data
from transformers import (
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import addenda as ad
from addenda import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train.consistency import Consistency, check, divergence
from addenda.train.fit import fit
from pictures import SIDE, config
from shared import KilledError, killed_at, same_bits, values
from tiny_models import config as sizes
from tiny_models import make_bert, make_llama, make_tokenizer

MOSA = "mosa:rank=4,reads=input"


class Attends(torch.nn.Module):
    """torch's own attention, which keeps its dropout as a number."""

    def __init__(self, dropout):
        super().__init__()
        self.inside = torch.nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.inside(x, x, x)[0])


def llama(options):
    return LlamaForCausalLM(sizes(LlamaConfig, **options))


def gpt2(options):
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **options))


def gptj(options):
    none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} | options
    return GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=4, **none))


def run(train, method=MOSA, model=None, **options):
    model = model or make_llama()
    adapter = ad.attach(model, method, seed=3, also_train=options.pop("also_train", ()))
    return model, adapter, fit(model, adapter, train, **{"steps": 8, "batch": 8, "rate": 1e-2, "seed": 5} | options)


def test_the_divergence_is_symmetric_and_each_side_is_drawn_to_the_other():
    a, b = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    want = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    torch.testing.assert_close(divergence(a, b).double(), want, rtol=1e-5, atol=1e-6)
    ga, gb = torch.autograd.grad(divergence(a, b), (a, b))
    torch.testing.assert_close(ga, 0.5 * (p - q).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gb, -ga)
    assert float(divergence(a, a.clone()).detach()) == 0


def test_the_loss_is_that_of_two_draws():
    train, model = data(), make_llama().train()
    adapter = ad.attach(model, MOSA, seed=3)
    for p in adapter.parameters():
        p.data.normal_(std=0.5)
    batch = train.batch([0, 5, 9])
    seen = batch["labels"][:, 1:] != -100
    logits, losses = [], []
    for again in (0, 1):
        adapter.draw(again=again)
        logits.append(model(**{k: t for k, t in batch.items() if k != "labels"}).logits[:, :-1][seen])
        losses.append(F.cross_entropy(logits[-1], batch["labels"][:, 1:][seen], reduction="sum"))
    assert not torch.equal(*logits)
    adapter.draw()
    before = [t.tensors()["up_drawn"].clone() for _, t in adapter.sites()]
    total, count = Consistency(0.7, 0.2).total(model, adapter, batch, "causal")
    want = losses[0] + 0.2 * losses[1] + 0.7 * divergence(*logits)
    torch.testing.assert_close(total, want)
    assert count == int(seen.sum())
    assert [t.tensors()["up_drawn"] for _, t in adapter.sites()] == before


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    train = data()
    options = {"consistency": 1.0, "save_every": 3}
    _, whole, result = run(train, MOSA + ",dropout=0.2", **options)
    with pytest.raises(KilledError):
        run(train, MOSA + ",dropout=0.2", out=tmp_path, progress=killed_at(5), **options)
    torch.manual_seed(99)
    _, parts, again = run(train, MOSA + ",dropout=0.2", out=tmp_path, resume=True, **options)
    assert again.resumed_from == 3
    assert same_bits(values(whole), values(parts)) and again.losses == result.losses
    with pytest.raises(AddendaError, match=r"consistency was 1\.0, now 0\.5"):
        run(train, MOSA + ",dropout=0.2", out=tmp_path, resume=True, **options | {"consistency": 0.5})


def test_parts_of_a_batch_share_the_steps_draws():
    train = data()
    plain, parts = (run(train, steps=4, consistency=1.0, accumulate=n)[2] for n in (1, 4))
    assert [x for _, x in plain.losses] == pytest.approx([x for _, x in parts.losses], rel=1e-4)
    assert plain.losses[1:] != run(train, steps=4)[2].losses[1:]
    assert plain.choices["loss"]["name"] == "logits"


def test_classifiers_have_it_and_dropout_is_enough():
    rows = [{"text": f"{a}+{b}", "label": str((a + b) % 2)} for a in range(6) for b in range(6)]
    train = encode(read(rows, task="label"), make_tokenizer())
    model, _, made = run(train, "lora:rank=2", make_bert(), steps=3, consistency=1.0, also_train=["classifier"])
    assert any(isinstance(m, torch.nn.Dropout) for m in model.modules())
    assert len(made.losses) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "lora:rank=2"}, r"Nothing is drawn .*\(lora\).*would be 0\. Take .* that draws \(mosa, .*dylora"),
        ({"method": "mosa:rank=4,reads=input,parts=1"}, "Nothing is drawn"),
        ({"loss": "chunked"}, "compares logits, which loss='chunked' never holds"),
        ({"checkpointing": True}, "run the first forward again with the draws of the second"),
        ({"consistency": -1.0}, "consistency must be at least 0"),
        ({"consistency": 0.0, "consistency_add": 1.0}, "give consistency too"),
    ],
)
def test_where_it_makes_no_sense(options, says):
    with pytest.raises(AddendaError, match=says):
        run(data(), **{"consistency": 1.0} | options)


def vision(**options):
    return Dinov2ForImageClassification(config(**options)), {"pixel_values": torch.randn(2, 3, SIDE, SIDE)}


def text(make, **options):
    return make(options), {"input_ids": torch.arange(12).reshape(2, 6)}


@pytest.mark.parametrize(
    ("draws", "made"),
    [
        (True, lambda: vision(drop_path_rate=0.5)),
        (True, lambda: vision(attention_probs_dropout_prob=0.2)),
        (False, lambda: vision()),
        (True, lambda: text(llama, attention_dropout=0.2)),
        (False, lambda: text(llama)),
        (True, lambda: text(gpt2, attn_pdrop=0.2, resid_pdrop=0.0, embd_pdrop=0.0)),
        (False, lambda: text(gpt2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),  # but of a head, 0.1
        (True, lambda: text(gptj, attn_pdrop=0.2)),  # read from the configuration
        (False, lambda: text(gptj)),
        (True, lambda: (Attends(0.2), {"x": torch.randn(2, 5, 8)})),
        (False, lambda: (Attends(0.0), {"x": torch.randn(2, 5, 8)})),
    ],
)
def test_it_is_refused_where_two_forwards_are_the_same(draws, made):
    model, batch = made()
    adapter = ad.attach(model.train(), "lora:rank=2")
    torch.manual_seed(0)
    one, two = (getattr(out, "logits", out) for out in (model(**batch), model(**batch)))
    assert torch.equal(one, two) != draws
    if draws:
        check(adapter, "class", "auto", False)
    else:
        with pytest.raises(AddendaError, match="Nothing is drawn"):
            check(adapter, "class", "auto", False)


def test_values_have_no_distribution():
    rows = [{"text": f"{a}+{b}", "label": float(a + b)} for a in range(4) for b in range(4)]
    train = encode(read(rows, task="label", label_kind="number"), make_tokenizer())
    with pytest.raises(AddendaError, match="this task predicts values"):
        run(train, "mosa-houlsby:rank=4", make_bert(1), consistency=1.0)
