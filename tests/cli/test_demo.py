"""`addenda demo`: its stages in order, what it leaves, how it goes on; a tiny encoder and a tiny Llama stand in."""

import json

import pytest

from addenda.cli import demo
from addenda.cli.main import run
from addenda.comparing import embedded, encoder
from addenda.comparing.choose import Choice
from addenda.core.base.errors import AddendaError
from addenda.data.docstrings import LIBRARIES, _hash
from addenda.data.task import Example, Task
from addenda.models.machine import DTYPES
from tiny_models import make_bert, make_llama, make_tokenizer

METHODS = ["lora:rank=2", "ia3"]


def call(*arguments):
    with pytest.raises(SystemExit) as stopped:
        run([str(a) for a in arguments])
    return stopped.value.code or 0


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo with a tiny BERT, two methods, two seeds and a few steps; its folder."""
    make_bert(labels=8).save_pretrained(tmp_path / "bert")
    make_llama().save_pretrained(tmp_path / "llama")
    for name in ("bert", "llama"):
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [(f"{'abcdefgh'[c]} is text {i:02d}", name, "class") for c, name in enumerate(LIBRARIES) for i in range(30)]
    rows.sort(key=lambda row: _hash(row[0]))
    sizes = {"train": 80, "validation": 40, "test": 80}
    monkeypatch.setattr(encoder, "docstrings", lambda tell: rows)
    monkeypatch.setattr(
        "addenda.comparing.run.subject_of",
        lambda *_: encoder.on_docstrings(tmp_path / "bert", sizes=sizes, dtype="float32"),
    )
    short = {"methods": ",".join(METHODS), "budget": "steps=4", "batch": 4, "seeds": 2, "rates": 1}
    monkeypatch.setattr(embedded, "PLAN", embedded.PLAN | short)
    monkeypatch.setattr("addenda.models.embedded.model_folder", lambda progress=None: tmp_path / "llama")
    examples = [Example(f"{a}+{b}=?", str(a + b)) for a in range(5) for b in range(5)]
    task = Task("sums", "sums", "exact match", {"train": examples, "test": examples[:3]}, {})
    monkeypatch.setattr("addenda.data.task.embedded_task", lambda: task)
    monkeypatch.setattr(demo, "_fetch", lambda: None)
    monkeypatch.setattr(demo, "TUNING", {name: {"steps": 3, "batch": 4} for name in demo.TUNING})
    return tmp_path / "runs" / "demo"


def _take(monkeypatch, arm):
    made = Choice(
        cost="memory", arm=arm, title=arm, value=1.0, why=f"{arm} is the best.", best=arm, not_worse=(arm,), cheaper=(),
        left_out={}, command=None, margin=2.0,
    )  # fmt: skip
    monkeypatch.setattr(demo, "_choose", lambda record: made)


def test_the_stages_leave_a_record_a_report_an_adapter_and_answers(tiny_demo, monkeypatch, capsys):
    _take(monkeypatch, METHODS[0])
    assert call("demo", "--out", tiny_demo) == 0
    told = capsys.readouterr()
    stages = [line.split("]")[0][1:] for line in told.err.splitlines() if line.startswith("[")]
    assert stages == [name for stage in ("fetch", "compare", "choose", "tune", "answers") for name in (stage, stage)]
    assert f"{METHODS[0]} is the best." in told.out and "of 3; after:" in told.out
    kept = json.loads((tiny_demo / "demo.json").read_text())
    assert kept["choice"]["arm"] == METHODS[0] and kept["tuned"]["steps"] == 3
    assert [a["question"] for a in kept["answers"]] == ["0+0=?", "0+1=?", "0+2=?"]
    assert set(kept["seconds"]) == set(stages)
    config = json.loads((tiny_demo / "config.json").read_text())
    assert config["command"] == "addenda demo" and list(config["methods"]) == METHODS
    assert (tiny_demo / "report.html").exists() and (tiny_demo / "adapter" / "adapter.safetensors").exists()


def test_the_same_command_goes_on_and_repeats_nothing(tiny_demo, monkeypatch, capsys):
    _take(monkeypatch, METHODS[1])
    real = demo._tune
    monkeypatch.setattr(demo, "_tune", lambda arm, out: (_ for _ in ()).throw(AddendaError("killed")))
    assert call("demo", "--out", tiny_demo) == 2
    trials = {p: p.read_bytes() for p in (tiny_demo / "trials").iterdir()}
    monkeypatch.setattr(demo, "_tune", real)
    assert call("demo", "--out", tiny_demo) == 0
    assert {p: p.read_bytes() for p in (tiny_demo / "trials").iterdir()} == trials
    first = json.loads((tiny_demo / "demo.json").read_text())
    assert call("demo", "--out", tiny_demo) == 0
    again = json.loads((tiny_demo / "demo.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_where_nothing_is_recommended_nothing_is_trained(tiny_demo, capsys):
    assert call("demo", "--out", tiny_demo) == 0  # after four steps no method beats the fitted head
    assert "Nothing is recommended" in capsys.readouterr().out
    assert (tiny_demo / "report.html").exists() and not (tiny_demo / "adapter").exists()


def test_a_file_of_others_is_left_alone(tiny_demo, capsys):
    tiny_demo.mkdir(parents=True)
    (tiny_demo / "demo.json").write_text("{}")
    assert call("demo", "--out", tiny_demo) == 2
    assert "demo.json" in capsys.readouterr().err and not (tiny_demo / "config.json").exists()


def test_the_class_of_the_processor_decides_how_long_is_trained():
    assert set(demo.TUNING) == {"bfloat16", "float32"} <= set(DTYPES)
    assert all(set(plan) == {"steps", "batch"} for plan in demo.TUNING.values())


@pytest.mark.slow
def test_the_real_models_are_chosen_by_and_trained(tmp_path, monkeypatch):
    from addenda.models.embedded import SMOLLM2
    from addenda.models.encoders import ENCODERS

    if not all(model.available() for model in (ENCODERS[embedded.ENCODER], SMOLLM2)):
        pytest.skip("`addenda setup-demo` has not fetched the models")
    short = {"methods": "lora", "seeds": 3, "rates": 1, "search_steps": None}
    monkeypatch.setattr(embedded, "PLAN", embedded.PLAN | short)
    monkeypatch.setattr(demo, "TUNING", {name: {"steps": 20, "batch": 4} for name in demo.TUNING})
    monkeypatch.setattr(demo, "QUESTIONS", 2)
    assert call("demo", "--out", tmp_path / "demo") == 0
    trials = [json.loads(p.read_text()) for p in (tmp_path / "demo" / "trials").iterdir()]
    base = next(t["test"]["accuracy"] for t in trials if t["stage"] == "control")
    lora = [t["test"]["accuracy"] for t in trials if t["stage"] == "final" and t["method"] == "lora"]
    assert 0.4 < base < 0.65 and sum(lora) / 3 > base + 0.02  # eight classes; 0.526 and 0.568 on seed 100
    assert (tmp_path / "demo" / "adapter" / "adapter.safetensors").exists()
