"""A killed trial goes on, one without a whole checkpoint begins again, one that diverges is a result."""

import json
from dataclasses import replace

import pytest
import torch

import addenda as ad
from addenda.comparing import grouped_trials
from addenda.comparing import trial as trials
from addenda.comparing.arm import parse_arm
from addenda.comparing.entries import Grouping, TrialSpec
from addenda.comparing.grouped_trials import GroupedTrials
from addenda.comparing.runner import CHECKPOINT_SECONDS, OneByOne
from addenda.comparing.subject import from_files
from addenda.comparing.trial import TrialSettings, goes_on, trial
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train import checkpoint
from addenda.train.fit import fit
from tiny_models import SUMS, make_llama, make_tokenizer

ARM = replace(parse_arm("lora:rank=2", None), rates=(1e-3,))
SETTINGS = TrialSettings(batch=4, validation=4)


@pytest.fixture
def subject(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return from_files(tmp_path / "model", tmp_path / "sums.jsonl", dtype="float32")


def spoil(adapter):
    """What a last step with an overflow leaves: every loss is finite, as no forward came behind it."""
    with torch.no_grad():
        adapter.parameters()[0].view(-1)[0] = float("inf")


def test_a_trial_without_a_whole_checkpoint_begins_again(tmp_path):
    assert goes_on(tmp_path / "none")
    model = make_llama()
    fit(model, ad.attach(model, "lora:rank=2"), encode(read(SUMS), make_tokenizer()), steps=1, batch=8, out=tmp_path)
    assert goes_on(tmp_path)
    (checkpoint.latest(tmp_path) / "optimizer.safetensors").write_bytes(b"")
    assert not goes_on(tmp_path)


@pytest.mark.parametrize("stage", ["search", "final"])
def test_an_adapter_that_its_last_step_spoils_has_diverged(stage, subject, monkeypatch):
    def spoiled(model, adapter, *args, **options):
        made = fit(model, adapter, *args, **options)
        spoil(adapter)
        return made

    monkeypatch.setattr(trials, "fit", spoiled)
    run = trial(subject, ARM, SETTINGS, TrialSpec("lora:rank=2", stage, 0, 1e-3, 2), after=lambda adapter: 1 / 0)
    assert (run.status, run.note) == ("diverged", "the adapter holds values that are not finite")
    assert run.losses == () and run.test is None and "no adapter attached" in ad.status(subject.model)


def test_so_has_one_with_outputs_that_are_not_finite(subject, monkeypatch):
    def spoiled(model, adapter, *args, **options):
        made = fit(model, adapter, *args, **options)
        if stage == "search":
            made.evaluations[-1]["loss"] = float("nan")
        else:
            with torch.no_grad():
                for p in adapter.parameters():
                    p.fill_(1e30)  # of which a product is infinite
        return made

    monkeypatch.setattr(trials, "fit", spoiled)
    for stage in ("search", "final"):
        run = trial(subject, ARM, SETTINGS, TrialSpec("lora:rank=2", stage, 0, 1e-3, 2))
        assert (run.status, run.note) == ("diverged", "what it is judged by is not finite")
        assert run.losses == run.validation == ()


def test_so_has_one_of_which_no_checkpoint_can_be_written(subject, monkeypatch):
    def spoiled(model, adapter, *args, **options):
        if broken:
            spoil(adapter)
        raise AddendaError("cannot be saved")

    monkeypatch.setattr(trials, "fit", spoiled)
    spec = TrialSpec("lora:rank=2", "final", 0, 1e-3, 2)
    broken = True
    assert trial(subject, ARM, SETTINGS, spec).status == "diverged"
    broken = False
    with pytest.raises(AddendaError, match="cannot be saved"):
        trial(subject, ARM, SETTINGS, spec)


def test_a_group_of_which_no_checkpoint_can_be_written_runs_one_after_another(subject, monkeypatch, tmp_path):
    def breaks_off(*args, **options):
        raise AddendaError("trial0/A holds values that are not finite")

    monkeypatch.setattr(grouped_trials, "fit_grouped", breaks_off)
    own = OneByOne(subject, [ARM], SETTINGS, tmp_path / "runs", {"lora:rank=2": 1e-3}, lambda *of: None)
    grouping = {"lora:rank=2": Grouping(pays=True, most=2, step_seconds=CHECKPOINT_SECONDS, pace=1.0)}
    specs = [TrialSpec("lora:rank=2", "final", seed, 1e-3, 2) for seed in range(2)]
    made = list(GroupedTrials(own, grouping, tmp_path / "runs")(specs))
    assert [(spec, run.status, run.grouped) for spec, run in made] == [(spec, "ok", None) for spec in specs]
    assert "no adapter attached" in ad.status(subject.model)
