import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.read import read
from addenda.train.evaluate import evaluate
from addenda.train.generate import generate
from addenda.train.tune import tune
from addenda.transferring.distil import distil
from addenda.transferring.label import Labels, label
from addenda.transferring.soft import soften
from lister import make_other_tokenizer
from tiny_models import SUMS, config, make_bert, make_llama, make_tokenizer


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))


def answered(rows=SUMS[:24]) -> Labels:
    return Labels(tuple(r["question"] for r in rows), tuple(r["answer"] for r in rows), (True,) * len(rows))


def other_student():
    settings = config(hidden_size=48)
    settings.vocab_size = len(tokenizer := make_other_tokenizer())
    torch.manual_seed(1)
    return type(make_llama())(settings).eval(), tokenizer


def test_by_sequence_it_is_ordinary_tuning_on_the_answers():
    options = {"steps": 6, "batch": 8, "rate": 1e-2, "seed": 3}
    one, two = make_llama(), make_llama()
    made = distil(one, make_tokenizer(), answered(), "lora:rank=4", **options)
    usual = tune(two, SUMS[:24], "lora:rank=4", tokenizer=make_tokenizer(), progress=False, **options)
    assert made.losses == usual.losses
    for a, b in zip(made.adapter.parameters(), usual.adapter.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (made.mode, made.examples, made.unended) == ("sequence", 24, 0)


@pytest.mark.parametrize("method", ["dora:rank=4", "svft:pattern=banded,band=2", "lora:rank=4"])
def test_a_student_with_another_tokenizer_learns_what_the_teacher_answers(method):
    teacher, its = make_llama(), make_tokenizer()
    tune(teacher, SUMS[:8], "lora:rank=16", tokenizer=its, steps=60, rate=2e-2, batch=8, progress=False)
    labels = label(teacher, its, [row["question"] for row in SUMS[:8]], max_new_tokens=6)
    student, tokenizer = other_student()
    prompts = [example.question for example in labels.data().examples]
    wanted = [example.answer for example in labels.data().examples]
    assert generate(student, tokenizer, prompts, max_new_tokens=6) != wanted
    made = distil(student, tokenizer, labels, method, steps=30, rate=2e-2, batch=8)
    assert generate(student, tokenizer, prompts, max_new_tokens=6) == wanted
    assert made.examples == sum(labels.whole) and made.unended == 8 - sum(labels.whole)


@pytest.mark.parametrize("top_k", [None, 8])
def test_by_logits_a_student_comes_to_think_as_the_teacher(top_k):
    teacher, tokenizer = make_llama(), make_tokenizer()
    adapter = ad.attach(teacher, "lora:rank=4")
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    rows = soften(teacher, tokenizer, answered().data())
    entropy = -float((torch.cat(rows.teacher).exp() * torch.cat(rows.teacher)).sum(1).mean())
    options = {"steps": 60, "batch": 24, "rate": 2e-2, "mode": "logits", "teacher": (teacher, tokenizer)}
    student = make_llama()
    made = distil(student, tokenizer, answered(), "lora:rank=8", top_k=top_k, **options)
    found = evaluate(student, examples=rows).loss
    assert found - entropy < 0.3 * (evaluate(make_llama(), examples=rows).loss - entropy)  # KL, by the whole of both
    assert made.losses[-1][1] < made.losses[0][1] and made.mode == "logits"


def test_a_start_at_the_teacher_learns_nothing(tmp_path):
    teacher, tokenizer = make_llama(), make_tokenizer()
    adapter = ad.attach(teacher, "lora:rank=2")
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.1)
    file = adapter.save(tmp_path / "teacher.safetensors")
    options = {"mode": "logits", "teacher": (teacher, tokenizer), "steps": 3, "batch": 24, "rate": 1e-2, "clip": 0.0}
    made = distil(make_llama(), tokenizer, answered(), start=file, optimizer=sgd, **options)
    for a, b in zip(made.adapter.parameters(), adapter.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    away = distil(make_llama(), tokenizer, answered(), "lora:rank=2", optimizer=sgd, **options)
    assert away.losses[0][1] > made.losses[0][1] + 1e-4


def sgd(adapter, rate, weight_decay):
    return torch.optim.SGD(adapter.parameters(), lr=rate)


def test_a_killed_run_goes_on(tmp_path):
    options = {"method": "lora:rank=2", "batch": 4, "steps": 8, "rate": 1e-2}
    whole = distil(make_llama(), make_tokenizer(), answered(), out=tmp_path / "whole", **options)

    class StoppedError(Exception):
        pass

    def stop(event):
        if event.step == 6:
            raise StoppedError

    model = make_llama()
    with pytest.raises(StoppedError):
        distil(model, make_tokenizer(), answered(), out=tmp_path / "cut", progress=stop, **options)
    assert ad.status(model).endswith("no adapter attached") or "0 adapter" in ad.status(model)
    made = distil(make_llama(), make_tokenizer(), answered(), out=tmp_path / "cut", resume=True, **options)
    assert made.resumed_from == 5
    for a, b in zip(made.adapter.parameters(), whole.adapter.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be():
    model, tokenizer = make_llama(), make_tokenizer()
    student, other = other_student()
    for options, said in (
        ({"mode": "words"}, "'sequence' or 'logits'"),
        ({"mode": "logits"}, "give teacher="),
        ({"top_k": 3}, "top_k= is for mode='logits'"),
        ({"mode": "logits", "teacher": (student, other)}, "have|has 77 tokens and the student's 76.*mode='sequence'"),
        ({"mode": "logits", "teacher": (model, tokenizer), "consistency": 0.5}, "loss of its own"),
        ({"steps": 1, "epochs": 1.0}, "not both"),
    ):
        with pytest.raises(AddendaError, match=said):
            distil(model, tokenizer, answered(), **options)
    with pytest.raises(AddendaError, match="writes no answers"):
        distil(make_bert(), tokenizer, answered())
    with pytest.raises(AddendaError, match="longer than the context"):
        distil(model, tokenizer, read([{"question": "a", "answer": "b" * 300}]))
    assert "no adapter" in ad.status(model)


@pytest.mark.parametrize("labels", [None, ["1+1"]])
def test_what_is_distilled_are_labels(labels):
    with pytest.raises(AddendaError, match=r"distil takes the Labels that label\(\) returns, or Data, got a"):
        distil(make_llama(), make_tokenizer(), labels)
