"""Runs of a comparison at once: which arms are grouped, what the record says, and the same verdicts as alone."""

import json
import re
from dataclasses import replace

import pytest
import torch

from addenda.comparing import grouped_trials
from addenda.comparing.arm import parse_arm
from addenda.comparing.entries import Grouping, TrialSpec
from addenda.comparing.grouped_trials import formed, tried
from addenda.comparing.record import Record
from addenda.comparing.report import at_once, page
from addenda.comparing.run import Watch, compare
from addenda.comparing.stats import analyse
from addenda.comparing.subject import from_files
from addenda.comparing.trial import TrialSettings
from addenda.core.base.errors import AddendaError
from tiny_models import make_llama, make_tokenizer

QUIET = Watch(say=lambda text: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("grouped")
    make_llama().save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    rows = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (place / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return place / "model", place / "sums.jsonl"


def run(files, out, **options):
    asked = {"methods": ["lora:rank=2", "shira"], "budget": "steps=12", "seeds": 2, "batch": 4, "rates": 3,
             "watch": QUIET, "general": None}  # fmt: skip
    return compare(*files, out=out, dtype="float32", **(asked | options))


@pytest.fixture(scope="module")
def both(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("records")
    return run(files, out / "alone", grouped=False), run(files, out / "grouped", grouped=True)


def test_the_same_verdicts_either_way(both):
    alone, grouped = both
    assert {t.name for t in alone.trials} == {t.name for t in grouped.trials}
    for t in (t for t in alone.trials if t.stage != "control"):
        other = grouped.find(t.method, t.stage, t.seed, t.rate, t.steps)
        assert other.grouped > 1 and t.grouped is None
        for (_, a), (_, b) in zip(other.losses, t.losses, strict=True):
            assert a == pytest.approx(b, rel=2e-5)  # records keep six digits
        if t.test is not None:
            assert other.test.items == t.test.items
    a, b = analyse(alone), analyse(grouped)
    assert a.letters == b.letters
    assert [(p.a, p.b, p.verdict) for p in a.pairs] == [(p.a, p.b, p.verdict) for p in b.pairs]


def test_the_record_says_what_ran_at_once_and_what_an_arm_takes_alone(both):
    record = Record.read(both[1].path)
    for label, made in record.config.grouped.items():
        assert made.pays and made.runs == 3 and made.most == 9 and made.ratio > 0
        finals = record.trials_of(label, "final")
        assert {t.step_seconds for t in finals} == {made.step_seconds}
        assert {t.grouped for t in finals} == {len(record.trials_of(stage="final"))}
    assert both[0].config.grouped is None


def test_costs_are_of_one_kind_where_some_arms_run_alone(files, tmp_path):
    record = run(files, tmp_path / "r", grouped=True, full=True, rates=1)
    full = record.config.grouped["full"]
    assert not full.pays and full.why and full.step_seconds > 0 and record.config.grouped["shira"].pays
    for label, made in record.config.grouped.items():
        for t in record.trials_of(label, "final"):
            assert (t.step_seconds, t.peak_bytes, t.tokens_per_second) == pytest.approx(
                (made.step_seconds, made.peak_bytes, made.pace)
            )
    assert {t.grouped for t in record.trials_of("full", "final")} == {None}


def test_a_killed_group_is_begun_again_and_nothing_is_lost(files, tmp_path, both, monkeypatch):
    class KilledError(Exception):
        pass

    concluded, told = grouped_trials.concluded, []

    def kill(subject, adapter, spec, *more):
        told.append(spec)
        if len(told) == 5:
            raise KilledError
        return concluded(subject, adapter, spec, *more)

    monkeypatch.setattr(grouped_trials, "concluded", kill)
    with pytest.raises(KilledError):
        run(files, tmp_path / "r", grouped=True)
    kept = Record.read(tmp_path / "r")
    assert len([t for t in kept.trials if t.stage != "control"]) == 4
    monkeypatch.undo()
    record = run(files, tmp_path / "r", grouped=True)
    assert {t.name for t in record.trials} == {t.name for t in both[0].trials}


def test_auto_tries_nothing_where_a_comparison_is_short(files, tmp_path):
    record = run(files, tmp_path / "r", rates=1, methods=["lora:rank=2"], grouped="auto", budget="steps=2")
    made = record.config.grouped["lora:rank=2"]
    assert not made.pays and made.runs is None and record.trials_of(stage="final")[0].grouped is None
    assert re.fullmatch(r"all runs together are predicted to take less than 2 minutes, and trying a .*", made.why)
    assert at_once(record) == [f"No: {made.why}."] and f"No: {made.why}." in page(record)
    again = run(files, tmp_path / "r", rates=1, methods=["lora:rank=2", "shira"], grouped="auto", budget="steps=2")
    assert again.config.grouped["lora:rank=2"] == made  # as it was begun
    assert again.config.grouped["shira"].why == "the runs before it went one after another"


def test_the_report_says_what_ran_at_once(both):
    assert at_once(both[0]) == ["No: one run after another was asked for."]
    told = at_once(both[1])
    assert [text.partition(":")[0] for text in told] == ["LoRA", "SHiRA"]
    assert all(re.search(r": up to 9, \d+\.\d × as fast as one after another\.$", text) for text in told)
    config = both[1].config
    some = dict(config.grouped) | {"shira": Grouping(pays=False, why="every parameter is trained")}
    mixed = replace(both[1], config=replace(config, grouped=some))
    assert at_once(mixed)[1] == "SHiRA: one after another: every parameter is trained."
    assert "SHiRA: one after another: every parameter is trained." in page(mixed)


def test_what_is_not_grouped_says_why(files, monkeypatch):
    subject = from_files(*files, dtype="float32")
    settings = TrialSettings(batch=4)

    def of(text, count=2, asked=True, pace=0.0):
        return tried(subject, replace(parse_arm(text, None), rates=(1e-3,)), settings, count, asked, pace)

    assert of("full").why == "every parameter is trained, so that no base is shared"
    assert "consistency: a run with that is trained alone" in of("dylora:rank=2@consistency=1").why
    assert of("lora:rank=2", count=1).why == "there is one run of it"
    assert "a step takes 3.00 s" in of("lora:rank=2", asked="auto", pace=3.0).why
    monkeypatch.setattr(grouped_trials, "PAYS", 1e9)
    slow = of("lora:rank=2", asked="auto")
    assert not slow.pays and "as fast as one after another" in slow.why

    def refuse(*_, **__):
        raise AddendaError("cannot tell rows")

    monkeypatch.setattr(grouped_trials, "fit_grouped", refuse)
    assert of("lora:rank=2") == Grouping(pays=False, why="cannot tell rows")


def test_a_model_whose_rows_depend_on_each_other_is_found_out(files):
    """A layer that mixes the batch: the losses of a group are then others, and the arm runs alone."""
    subject = from_files(*files, dtype="float32")
    norm = subject.model.model.norm
    norm.register_forward_hook(lambda module, args, y: y + 0.5 * y.roll(1, 0))
    arm = replace(parse_arm("lora:rank=2", None), rates=(1e-2,))
    made = tried(subject, arm, TrialSettings(batch=4), 2, True)
    assert not made.pays and "in a group, and" in made.why
    assert not torch.is_grad_enabled() or made.ratio is None


def test_groups_are_of_equal_steps_and_near_each_other_in_size():
    specs = [TrialSpec(m, "final", seed, 1e-3, steps) for seed in range(5) for m, steps in
             (("a", 10), ("b", 10), ("c", 10), ("d", 20))]  # fmt: skip
    chosen = {"a": Grouping(pays=True, most=9), "b": Grouping(pays=True, most=6), "d": Grouping(pays=True, most=9)}
    groups = formed(specs, chosen)
    assert sorted(map(len, groups)) == [1] * 5 + [5, 5, 5]
    assert [s for g in groups for s in g if s.method == "c"] == [s for s in specs if s.method == "c"]
    assert all(len({s.steps for s in g}) == 1 for g in groups)
    assert sorted(s.name for g in groups for s in g) == sorted(s.name for s in specs)
