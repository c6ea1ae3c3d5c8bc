"""The embedded encoder as a subject: its head is fitted beforehand, belongs to the base, and the rest is as it was."""

from dataclasses import replace

import pytest
import torch

from addenda.comparing import encoder
from addenda.comparing.arm import parse_arm
from addenda.comparing.entries import TrialSpec
from addenda.comparing.trial import TrialSettings, control, trial
from addenda.data.docstrings import LIBRARIES, _hash
from tiny_models import make_bert, make_tokenizer

SIZES = {"train": 160, "validation": 40, "test": 80}


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """A random BERT on texts whose first letter says the library, every eighth of the next one's."""
    make_bert(labels=8).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rows = [
        ("abcdefghij"[c + (i % 8 == 0)] + f" is number {i:02d} of {c}", name, "class")
        for c, name in enumerate(LIBRARIES)
        for i in range(60)
    ]
    rows.sort(key=lambda row: _hash(row[0]))
    monkeypatch.setattr(encoder, "docstrings", lambda tell: rows)
    return encoder.on_docstrings(tmp_path, sizes=SIZES, dtype="float32"), tmp_path


def test_the_base_answers_with_the_fitted_head(subject):
    on, _ = subject
    assert {k: len(v) for k, v in on.splits.items()} == SIZES
    assert on.heads == () and not on.fresh and on.about_data.metric == "accuracy"
    test = control(on, "base", on.tested).test
    assert test is not None and 0.6 < test.accuracy < 1.0  # one of eight by chance, seven of eight by the letter


def test_only_pooler_and_classifier_are_fitted(subject):
    on, folder = subject
    before = make_bert(labels=8)
    changed = {k for k, v in on.model.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    assert changed == {f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}
    again = encoder.on_docstrings(folder, sizes=SIZES, dtype="float32")
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in on.model.state_dict().items())


def test_an_adapter_beside_the_head_trains(subject):
    on, _ = subject
    arm = replace(parse_arm("lora:rank=2"), rates=(1e-2,))
    run = trial(on, arm, TrialSettings(batch=8, validation=16), TrialSpec(arm.label, "final", 0, 1e-2, 12))
    assert run.status == "ok" and run.losses[-1][1] < run.losses[0][1]
