"""The comparison itself, end to end on a tiny model: searches, final runs, going on, dropping, budgets."""

import json
import math
import shutil
from dataclasses import replace

import pytest

import addenda
from addenda.comparing import run as running
from addenda.comparing import runner, start
from addenda.comparing.arm import parse_arm
from addenda.comparing.budget import Budget, fitted
from addenda.comparing.costs import Costs
from addenda.comparing.entries import MethodRecord, TrialRecord, Validation
from addenda.comparing.record import Record
from addenda.comparing.report import write_report
from addenda.comparing.run import Watch, compare
from addenda.comparing.search import FURTHER, cost
from addenda.comparing.start import titled
from addenda.comparing.subject import from_files
from addenda.comparing.trial import trial
from addenda.core.base.errors import AddendaError
from addenda.data.general import DOCSTRINGS
from tiny_models import make_llama, make_tokenizer

QUIET = Watch(say=lambda text: None)


@pytest.fixture
def files(tmp_path):
    """A folder with a tiny causal LM, and sums as JSON Lines."""
    return written(tmp_path)


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Leave the report out but where it is looked at: drawing takes as long as all runs of a tiny model."""
    if "report" not in request.node.name:
        monkeypatch.setattr(running, "write_report", lambda out: out / "report.html")


def written(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return tmp_path / "model", tmp_path / "sums.jsonl", tmp_path / "record"


def run(files, **options):
    model, data, out = *files[:2], options.pop("out", files[2])
    asked = {"methods": ["lora:rank=2", "shira"], "budget": "steps=4", "seeds": 2, "batch": 4, "watch": QUIET}
    return compare(model, data, out=out, dtype="float32", **(asked | options))


def test_a_comparison_leaves_a_record_and_a_report(files):
    record = run(files, rates=1, full=True)
    assert set(record.config.methods) == {"lora:rank=2", "shira", "full"}
    assert [t.seed for t in record.trials_of("shira", "final")] == [0, 1]
    assert record.find("base", "control")
    for t in record.trials_of(stage="final"):
        assert len(t.test.items) == record.config.data.sizes["test"]
        assert len(t.losses) == 4 and t.trainable > 0 and t.adapter_bytes > 0
    assert record.config.methods["full"].trainable == record.config.model.parameters
    assert "lora" in (files[2] / "report.html").read_text().lower()


def test_every_final_rate_lies_between_two_that_were_searched(files):
    record = run(files, rates=3, seeds=1, methods=["lora:rank=2", "shira"], around={"lora:rank=2": 0.03})
    for label, method in record.config.methods.items():
        searched, final = record.trials_of(label, "search"), record.trials_of(label, "final")
        tried = sorted({t.rate for t in searched})
        assert {t.seed for t in searched} == {1000, 1001} and set(method.rates) <= set(tried)
        assert (method.void is None) == bool(final)
        assert all(tried[0] < t.rate < tried[-1] for t in final)
        assert all(len(t.last_look.items) == record.config.data.sizes["validation"] for t in searched)
        assert all(t.last_look.items is None for t in final)
        assert sum(t.steps for t in searched) <= cost(3, 4, 4)[1]


@pytest.fixture
def made_up(monkeypatch):
    """Searches whose answers are made up: a function from (method, rate) to the share that is right, None: diverges."""

    def put(curve):
        def made(subject, arm, settings, spec, **more):
            if spec.stage != "search":
                return trial(subject, arm, settings, spec, **more)
            share = curve(spec.method, spec.rate)
            if share is None:
                return TrialRecord(**vars(spec), status="diverged", note="made up", losses=(), validation=())
            items = "".join("1" if i < 50 * share else "0" for i in range(50))
            look = Validation(loss=1 - share, accuracy=items.count("1") / 50, items=items)
            return TrialRecord(**vars(spec), status="ok", losses=((1, 1.0),), validation=((spec.steps, look),))

        monkeypatch.setattr(runner, "trial", made)

    return put


def near(rate, best):
    return 0.9 - 0.2 * abs(math.log10(rate / best))


def test_an_arm_whose_every_rate_diverges_is_void_and_the_others_go_on(files, made_up):
    made_up(lambda method, rate: None if method == "shira" else near(rate, 3e-3))
    told = []
    record = run(files, rates=3, watch=Watch(say=told.append))
    void = record.config.methods["shira"].void
    assert void.startswith("every rate diverged, from ") and record.config.methods["lora:rank=2"].void is None
    assert {t.method: t.rate for t in record.trials_of(stage="final")} == {"lora:rank=2": 3e-3}
    assert f"shira has no final runs: {void}." in told
    page = write_report(files[2]).read_text()
    assert f"SHiRA has no final runs: {void}." in page and "of 2 runs have finished" not in page
    before = noted(files[2])
    assert run(files, rates=3).config == record.config and noted(files[2]) == before
    grown = run(files, rates=3, seeds=3)
    assert grown.config.methods["shira"].void == void and not grown.trials_of("shira", "final")
    assert [t.rate for t in grown.trials_of("lora:rank=2", "final")] == [3e-3] * 3


def test_a_longer_budget_searches_again_and_may_lift_a_void(files, made_up):
    made_up(lambda method, rate: None if method == "shira" else near(rate, 3e-3))
    assert run(files, rates=3).config.methods["shira"].void
    made_up(lambda method, rate: near(rate, 3e-3))
    longer = run(files, rates=3, budget="steps=24")
    assert longer.config.methods["shira"].void is None
    assert len(longer.trials_of("shira", "final")) == 2 and {t.rate for t in longer.trials_of("shira", "final")} == {
        3e-3
    }


def test_no_arm_with_a_rate_is_said_and_nothing_is_lost(files, made_up):
    made_up(lambda method, rate: None)
    with pytest.raises(AddendaError, match=r"No arm has a rate .*lora:rank=2: every rate diverged.*shira: every rate"):
        run(files, rates=3)
    record = Record.read(files[2])
    assert all(m.void for m in record.config.methods.values()) and len(record.trials_of(stage="search")) == 28
    with pytest.raises(AddendaError, match="No arm has a rate"):
        run(files, rates=3)


def test_arms_leave_after_their_first_runs_where_time_is_short(files, made_up, monkeypatch):
    made_up(lambda method, rate: near(rate, 3e-3) - (0.3 if method == "shira" else 0))
    quick = Costs({"shira": 1.0, "lora:rank=2": 1.0}, 0.0, 0.0, 0, 2, Budget.parse("steps=24"), None, FURTHER)
    monkeypatch.setattr(start, "measure", lambda *_: quick)
    # of each: 2 × 3 × 10 steps at first, then 2 × (2 + 1) × 12, and 2 × 24
    record = run(files, methods=["shira", "lora:rank=2"], rates=3, budget="steps=24", within=1.05 * 250)
    assert record.config.search.arms == 1 and "1 of 2 methods go on" in " ".join(record.config.notes)
    assert record.config.methods["shira"].void.startswith("left after its first runs, for the time: 62.0% right")
    assert {t.method for t in record.trials_of(stage="final")} == {"lora:rank=2"}
    assert {t.steps for t in record.trials_of("shira", "search")} == {10}
    before = noted(files[2])
    run(files, methods=["shira", "lora:rank=2"], rates=3, budget="steps=24", within=1.05 * 250)
    assert noted(files[2]) == before


def test_two_rates_are_no_search(files):
    with pytest.raises(AddendaError, match="rates is 2; at least 3 are searched"):
        run((None, None, files[2]), rates=2)
    assert not files[2].exists()


def test_finished_runs_are_never_repeated(files):
    first = run(files, rates=1)
    done = sorted((files[2] / "trials").glob("*.json"))
    done[-1].unlink()
    ran = []
    watch = Watch(say=lambda text: None, trial=lambda *what: ran.append(what[:3]))
    again = run(files, rates=1, watch=watch)
    assert len(ran) == 1 and len(again.trials) == len(first.trials)


def test_the_same_command_gives_the_same_items(files):
    one = run(files, rates=1)
    (files[2] / "config.json").rename(files[2].parent / "kept.json")
    two = compare(
        *files[:2], ["lora:rank=2", "shira"], out=files[2].parent / "second", budget="steps=4", rates=1, batch=4,
        dtype="float32", watch=QUIET,
    )  # fmt: skip
    for t in one.trials_of(stage="final"):
        again = two.find(t.method, "final", t.seed)
        assert again.losses == t.losses and again.test.items == t.test.items


def test_another_comparison_in_the_same_place_is_refused(files):
    run(files, rates=1)
    with pytest.raises(AddendaError, match="Choose another --out"):
        run(files, rates=1, methods=["lora:rank=2", "oft"])
    with pytest.raises(AddendaError, match="base in the form None, not nf4"):
        run(files, rates=1, quantize="nf4")


def noted(record):
    return {p: p.read_bytes() for p in record.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"model": 1}, "base.weights was .*…, now"),
        ({"dtype": "bfloat16"}, "base.dtypes"),
        ({"batch": 5}, "settings.batch was 4, now 5"),
        ({"targets": "q_proj"}, "methods.lora:rank=2.targets was 'linear', now 'q_proj'"),
        ({"budget": "steps=2"}, "budget was 4.0, now 2.0"),
        ({"budget": "seconds=9"}, "of was 'steps', now 'seconds'"),
        ({"margin": 1}, r"margin was 2\.0, now 1\.0"),
        ({"seeds": 1}, "seeds was 2, now 1"),
        ({"rates": 3}, "asked.rates was 1, now 3"),
        ({"within": 1e6}, "asked.within was None, now 1000000.0"),
        ({"items": 7}, "data.examples.test was"),
        ({"validation": 3}, "settings.validation was 64, now 3"),
        ({"search_steps": 3}, "asked.search_steps was None, now 3"),
        ({"around": {"shira": 0.1}}, "asked.around.shira was None, now 0.1"),
        ({"methods": ["lora:rank=2"]}, "methods.shira was .*, now None"),
        ({"methods": ["lora:rank=4", "shira"]}, "methods.lora:rank=2 was .*, now None"),
        ({"data": 50}, "Choose another --out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_comparison_is_refused_and_nothing_is_touched(files, once, other, says):
    model, data, _ = files
    shutil.copytree(once, files[2])
    before = noted(files[2])
    if other.pop("model", None):
        make_llama(1).save_pretrained(model)
    if n := other.pop("data", None):
        data.write_text("\n".join(data.read_text().splitlines()[:n]))
    given = {"dtype": "float32", "budget": "steps=4", "seeds": 2, "batch": 4, "rates": 1, "watch": QUIET} | other
    arms = given.pop("methods", ["lora:rank=2", "shira"])
    with pytest.raises(AddendaError, match=says):
        compare(model, data, arms, out=files[2], **given)
    assert noted(files[2]) == before


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A record that every test copies."""
    folder = tmp_path_factory.mktemp("once")
    place = written(folder)
    compare(*place[:2], ["lora:rank=2", "shira"], out=place[2], budget="steps=4", seeds=2, batch=4, rates=1,
            dtype="float32", watch=QUIET)  # fmt: skip
    return place[2]


def test_a_comparison_grows_by_seeds_methods_and_steps_and_says_so(files, once):
    shutil.copytree(once, files[2])
    more = run(files, rates=1, seeds=3)
    assert [t.seed for t in more.trials_of("shira", "final")] == [0, 1, 2]
    more = run(files, rates=1, seeds=3, methods=["lora:rank=2", "shira", "oft"])
    assert len(more.trials_of("oft", "final")) == 3 and list(more.config.methods)[-1] == "oft"
    more = run(files, rates=1, seeds=3, methods=["lora:rank=2", "shira", "oft"], budget="steps=6")
    final = more.trials_of(stage="final")
    assert {t.steps for t in final} == {6} and len(final) == 9 and len(more.shorter) == 9
    assert [list(look.changed) for look in more.config.looks] == [["seeds"], ["methods"], ["budget"]]
    assert more.config.looks[0].seen == "5 runs" and more.config.looks[2].changed == {"budget": [4, 6]}
    page = write_report(files[2]).read_text()
    assert "seeds 2 to 3" in page and "also oft" in page and "budget 4 to 6" in page
    before = noted(files[2])
    again = run(files, rates=1, seeds=3, methods=["lora:rank=2", "shira", "oft"], budget="steps=6")
    assert again.config == more.config and noted(files[2]) == before
    with pytest.raises(AddendaError, match=r"seeds was 3, now 2"):
        run(files, rates=1, methods=["lora:rank=2", "shira", "oft"])


def test_a_grown_comparison_is_that_of_one_command(files, once):
    shutil.copytree(once, files[2])
    grown = run(files, rates=1, seeds=3)
    whole = run(files, rates=1, seeds=3, out=files[2].parent / "whole")
    for t in whole.trials_of(stage="final"):
        assert grown.find(t.method, "final", t.seed).losses == t.losses


def test_a_comparison_goes_on_with_as_many_items_of_each_split(files):
    """Also of a split ood that is longer than half of the test split."""
    model, data, out = files
    rows, parts = data.read_text().splitlines(), {"train": (0, 60), "validation": (60, 70), "test": (70, 78)}
    folder = out.with_name("data")
    folder.mkdir()
    for name, of in (parts | {"ood": (78, 100)}).items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows[slice(*of)]))
    one = run((model, folder, out), rates=1, methods=["shira"], seeds=1)
    assert (one.config.data.sizes["test"], one.config.data.sizes["ood"]) == (8, 22)
    two = run((model, folder, out), rates=1, methods=["shira"], seeds=2)
    assert [len(t.ood.items) for t in two.trials_of("shira", "final")] == [22, 22]
    assert two.config.data.sizes == one.config.data.sizes
    subject = from_files(model, folder, dtype="float32")
    cut = replace(subject, controls={"shots": subject.tested}).cut({"test": 3, "ood": 7})
    assert {k: len(e) for k, e in cut.controls["shots"].items()} == {"test": 3, "ood": 7}
    assert cut.about_data.sizes == {"train": 60, "validation": 10, "test": 3, "ood": 7}


def test_other_hardware_is_noted_once(files, once):
    shutil.copytree(once, files[2])
    config = json.loads((files[2] / "config.json").read_text())
    (files[2] / "config.json").write_text(json.dumps(config | {"hardware": {"cpu": "another"}}))
    (note,) = run(files, rates=1).config.notes
    assert "other hardware" in note
    before = noted(files[2])
    run(files, rates=1)
    assert noted(files[2]) == before


def test_a_title_that_nobody_gave_names_what_is_added(files, once):
    shutil.copytree(once, files[2])
    assert Record.read(files[2]).config.title == "lora:rank=2, shira on sums.jsonl"
    grown = run(files, rates=1, methods=["lora:rank=2", "shira", "ia3"])
    assert grown.config.title == "lora:rank=2, shira, ia3 on sums.jsonl"
    shutil.rmtree(files[2])
    shutil.copytree(once, files[2])
    config = json.loads((files[2] / "config.json").read_text())
    (files[2] / "config.json").write_text(json.dumps(config | {"title": "Mine"}))
    assert run(files, rates=1, methods=["lora:rank=2", "shira", "ia3"]).config.title == "Mine"


def test_the_margin_is_in_the_record_and_that_of_older_ones_is_two_points(files, once):
    shutil.copytree(once, files[2])
    config = json.loads((files[2] / "config.json").read_text())
    assert config["margin"] == config["identity"]["margin"] == 2.0
    del config["margin"], config["identity"]["margin"]  # as before margins were kept
    (files[2] / "config.json").write_text(json.dumps(config))
    with pytest.raises(AddendaError, match=r"margin was 2\.0, now 3\.5"):
        run(files, rates=1, margin=3.5)
    assert len(run(files, rates=1, seeds=3, margin=2).trials_of("shira", "final")) == 3
    for wrong in (0, -1, 101, float("nan")):
        with pytest.raises(AddendaError, match="margin must be a positive number, at most 100"):
            run(files, rates=1, margin=wrong)


def test_a_no_to_more_leaves_the_record(files, once):
    shutil.copytree(once, files[2])
    before = noted(files[2])
    with pytest.raises(AddendaError, match="Nothing was run"):
        run(files, rates=1, seeds=3, watch=Watch(say=lambda text: None, ask=lambda question: False))
    assert noted(files[2]) == before


def test_a_record_without_identity_is_read_and_never_extended(files, once):
    shutil.copytree(once, files[2])
    config = json.loads((files[2] / "config.json").read_text())
    del config["identity"], config["looks"]
    (files[2] / "config.json").write_text(json.dumps(config))
    before = noted(files[2])
    for more in ({}, {"seeds": 3}):
        with pytest.raises(AddendaError, match=r"read and reported .*, and never extended\. Choose"):
            run(files, rates=1, **more)
    assert noted(files[2]) == before and len(Record.read(files[2]).trials) == 5


def test_one_comparison_at_a_time(files, once):
    shutil.copytree(once, files[2])
    (files[2] / "trials" / sorted(p.name for p in (files[2] / "trials").iterdir())[-1]).unlink()
    told = []

    def another(*_):
        with pytest.raises(AddendaError, match="Another run is under way"):
            run(files, rates=1)
        told.append(1)

    run(files, rates=1, watch=Watch(say=lambda text: None, trial=another))
    assert told and not (files[2] / ".addenda-lock").exists()


def test_what_does_not_fit_the_time_is_dropped_and_said(files):
    told: list[str] = []
    record = run(files, full=True, within=0.05, watch=Watch(say=told.append))
    assert next(i for i, text in enumerate(told) if "follows the clock" in text) < told.index("measuring lora:rank=2")
    assert any("follows the clock" in note for note in record.config.notes)
    assert "\n".join(told).count("follows the clock") == 1
    assert len(record.config.methods) == 1 and len(record.config.search.rates["lora:rank=2"]) == 3
    notes = " ".join(record.config.notes)
    assert "cut to 3 learning rates" in notes and "full was left out" in notes and "shira was left out" in notes
    assert "all the same: nothing more can be dropped" in notes


def test_a_no_leaves_nothing(files):
    with pytest.raises(AddendaError, match="Nothing was run"):
        run(files, watch=Watch(say=lambda text: None, ask=lambda question: False))
    assert not files[2].exists()


def test_seconds_become_steps_once(files):
    record = run(files, rates=1, budget="seconds=0.2", seeds=1)
    steps = {k: m.steps for k, m in record.config.methods.items()}
    assert all(record.find(k, "final", 0).steps == n for k, n in steps.items())


def test_a_budget_of_parameters_sets_the_size(files):
    subject = from_files(*files[:2], dtype="float32")
    for spec in ("lora", "shira", "oft", "miss", "svft:pattern=banded"):
        method = fitted(subject.model, addenda.core.method.catalogue.build(spec), "linear", 3000)
        trained = addenda.plan(subject.model, method).trainable
        assert 0 < trained <= 3000, spec
    with pytest.raises(AddendaError, match="smallest form"):
        fitted(subject.model, addenda.core.method.catalogue.build("lora"), "linear", 10)


@pytest.mark.parametrize("text", ["steps", "steps=", "steps=0", "hours=3", "steps=many"])
def test_a_budget_that_makes_no_sense(text):
    with pytest.raises(AddendaError, match="steps=40"):
        Budget.parse(text)


def test_bad_input_is_refused_before_anything_runs(files):
    with pytest.raises(AddendaError, match="Did you mean 'lora'"):
        run(files, methods=["lorra"])
    with pytest.raises(AddendaError, match="named twice"):
        run(files, methods=["lora", "lora"])
    with pytest.raises(AddendaError, match="model= and data= together"):
        compare(files[0], None, watch=QUIET)
    with pytest.raises(AddendaError, match=r"^model is the path .*\(LlamaForCausalLM\)"):
        compare(make_llama(), files[1], out=files[2], watch=QUIET)
    with pytest.raises(AddendaError, match=r"^data is the path .*\(list\)"):
        compare(files[0], [{"question": "1+1=?", "answer": "2"}], out=files[2], watch=QUIET)
    with pytest.raises(AddendaError, match="matches nothing"):
        run(files, targets="nowhere")
    assert not files[2].exists()


def test_one_method_may_be_named_alone(files):
    with pytest.raises(AddendaError, match="There is no method 'lorra'"):  # not: 'l'
        run(files, methods="lorra")
    record = run(files, methods="lora:rank=2", budget="steps=1", seeds=1, rates=1)
    assert list(record.config.methods) == ["lora:rank=2"]


def test_an_arm_names_its_optimizer_and_its_rates(files):
    arms = ["lora:rank=2", "lora:rank=2@lora-pro:mode=efficient"]
    record = run(files, methods=arms, rates=1, around={arms[1]: 2e-4}, targets=["q_proj", "v_proj"])
    told = record.config.methods
    assert told[arms[1]].options == {"rank": 2, "optimizer": "lora-pro:mode=efficient"}
    assert max(told[arms[1]].rates) < min(told[arms[0]].rates)
    assert told[arms[0]].sites == told[arms[1]].sites == 4
    losses = [record.find(a, "final", 0).losses for a in arms]
    assert losses[0] != losses[1]
    assert len(run(files, methods=arms, rates=1, around={arms[1]: 2e-4}, targets=["q_proj", "v_proj"]).trials) == len(
        record.trials
    )
    with pytest.raises(AddendaError, match="lora-pro"):
        run(files, methods=["lora@lora-por"], out=files[2].parent / "other")
    config = json.loads((files[2] / "config.json").read_text())
    config["methods"][arms[1]]["options"]["optimizer"] = "lora-pro:mode=sgd"
    (files[2] / "config.json").write_text(json.dumps(config))
    with pytest.raises(AddendaError, match="other options"):
        run(files, methods=arms, rates=1, around={arms[1]: 2e-4}, targets=["q_proj", "v_proj"])


def test_an_arm_has_settings_of_training_of_its_own(files):
    arm = parse_arm("mosa:rank=4,parts=2@partwise-adamw:beta1=0.8@consistency=1,consistency_add=0.5")
    assert (arm.name, arm.optimizer) == ("mosa", "partwise-adamw:beta1=0.8")
    assert arm.training == {"consistency": 1.0, "consistency_add": 0.5}
    assert parse_arm("mosa@consistency=2").optimizer == "auto"
    for text, says in [
        ("lora@consistence=1", "no training option 'consistence'. Did you mean 'consistency'"),
        ("lora@consistency=much", "consistency must be float, got 'much'"),
        ("lora@adamw@lora-pro", "One optimizer trains an arm; .*'adamw' and 'lora-pro'"),
        ("lora@", "optimizer must be"),
    ]:
        with pytest.raises(AddendaError, match=says):
            parse_arm(text)
    arms = ["mosl:rank=4", "mosl:rank=4@consistency=1"]
    record = run(files, methods=arms, rates=1, seeds=1)
    assert record.config.methods[arms[1]].options == {"rank": 4, "consistency": 1.0}
    one, two = (record.find(a, "final", 0).losses for a in arms)
    assert one != two and one[0][1] == pytest.approx(two[0][1]), "at the start both draws are the base"
    assert len(run(files, methods=arms, rates=1, seeds=1).trials) == len(record.trials)
    with pytest.raises(AddendaError, match="Nothing is drawn"):
        run(files, methods=["lora@consistency=1"], out=files[2].parent / "other")
    assert not (files[2].parent / "other").exists()


def test_titles_say_what_tells_the_forms_of_a_method_apart():
    forms = {
        "a": MethodRecord(title="AdaptFormer", options={"scale": 1.0, "bias": False, "rank": 32, "bits": 1}),
        "b": MethodRecord(title="AdaptFormer", options={"scale": 1.0, "bias": False, "rank": 1}),
        "c": MethodRecord(title="AdaptFormer", options={"scale": 1.0, "bias": False}),
        "d": MethodRecord(title="LoRA", options={"rank": 4}),
    }
    titles = [m.title for m in titled(forms).values()]
    assert titles == ["AdaptFormer (rank 32, bits 1)", "AdaptFormer (rank 1)", "AdaptFormer (defaults)", "LoRA"]


def test_forgetting_is_measured_on_the_same_windows_for_all(files, tmp_path):
    file = tmp_path / "general.txt"
    file.write_text("the quick brown fox jumps over it\n" * 400)
    record = run(files, rates=1, general=file)
    about = record.config.data.general
    assert (about.name, about.python, about.windows) == ("general.txt", None, 32) and len(about.sha256) == 64
    base = record.find("base", "control").general
    for t in record.trials_of(stage="final"):
        assert len(t.general.losses) == about.windows and t.general.loss > 0
        assert t.general.loss == pytest.approx(sum(t.general.losses) / 32, rel=1e-5) and t.general != base
    assert "Forgetting,<br>nats a token" in write_report(files[2]).read_text()
    said = []
    grown = run(files, rates=1, seeds=3, watch=Watch(say=said.append))  # on the default text, which is another
    assert any("no forgetting is measured" in text for text in said)
    assert [t.general is None for t in grown.trials_of("shira", "final")] == [False, False, True]
    file.write_text("another one that is long enough\n" * 400)
    with pytest.raises(AddendaError, match=r"measures forgetting on general\.txt, and not on the text of"):
        run(files, rates=1, seeds=3, general=file)


def test_forgetting_can_be_left_out_and_is_first_to_go_where_time_is_short(files):
    assert run(files, rates=1, general=None).find("base", "control").general is None
    short = run(files, out=files[2].with_name("short"), rates=1, within=1e-3)
    assert short.config.data.general is None and any("Forgetting is not measured" in n for n in short.config.notes)
    assert all(t.general is None for t in short.trials)
    text = files[2].with_name("general.txt")
    text.write_text("the quick brown fox jumps over it\n" * 400)
    asked = {"out": files[2].with_name("text"), "rates": 1, "within": 1e-3, "general": text}
    assert run(files, **asked).config == run(files, **asked).config
    assert len(run(files, **asked, seeds=3).trials_of("lora:rank=2", "final")) == 3
    default = run(files, out=files[2].with_name("default"), rates=1, seeds=1, methods=["shira"])
    assert default.config.data.general.name == DOCSTRINGS and default.find("base", "control").general


def test_every_run_has_a_log_by_its_name_and_gives_the_same_numbers(files):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = {"methods": ["shira"], "rates": 3, "search_steps": 2, "general": None}
    logged = run(files, report_to="tensorboard", **asked)
    plain = run(files, out=files[2].with_name("plain"), **asked)
    folders = {p.name: p for p in (files[2] / "trackers" / "tensorboard").iterdir()}
    assert set(folders) == {t.name for t in logged.trials if t.stage != "control"}
    final = logged.find("shira", "final", 1)
    assert final.name.startswith("final-shira-seed1-rate")
    shown = [(e.step, e.value) for e in EventAccumulator(str(folders[final.name])).Reload().Scalars("train/loss")]
    assert shown == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in final.losses]
    assert [(t.name, t.losses, t.test) for t in logged.trials] == [(t.name, t.losses, t.test) for t in plain.trials]
    assert not (files[2].with_name("plain") / "trackers").exists()
    assert run(files, **asked).config == logged.config  # goes on without a tracker as well
    with pytest.raises(AddendaError, match="and not 'tensorbord'"):
        run(files, report_to="tensorbord", **asked)
