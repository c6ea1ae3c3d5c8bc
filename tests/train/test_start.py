"""A warm start: the values of a file begin a new run, whose schedules and optimizer begin anew."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.state.state import record_of
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train.fit import fit
from addenda.train.tune import tune
from tiny_models import SUMS, make_bert, make_llama, make_tokenizer

QUICK = {"steps": 3, "batch": 8, "progress": False, "rate": 1e-2}
SPAM = [{"text": "ab" * (i % 5 + 1), "label": "ham"} for i in range(12)] + [
    {"text": "9" * (i % 7 + 1), "label": "spam"} for i in range(12)
]


def run(model=None, data=SUMS, **options):
    model = make_llama() if model is None else model
    return tune(model, data, tokenizer=make_tokenizer(), **(QUICK | options))


@pytest.fixture
def file(tmp_path):
    return run(method="dylora:rank=4", targets="q_proj", seed=7, out=tmp_path / "first").path


def test_a_run_begins_with_the_values_of_a_file(file, tmp_path, monkeypatch):
    made = run(start=file, out=tmp_path / "second")
    assert {m.name for m in made.adapter.methods.values()} == {"dylora"} and len(made.adapter.methods) == 2
    assert made.adapter.step_count == 3
    assert record_of(made.adapter.model, "default").record.start[0] == 0  # a save counts the steps of this run
    by_hand = make_llama()
    adapter = ad.load(by_hand, file, trainable=True)
    adapter.draw(0)
    fit(by_hand, adapter, encode(read(SUMS), make_tokenizer(), max_length=256), steps=3, batch=8, rate=1e-2)
    assert all(torch.equal(t, made.adapter.state_dict()[k]) for k, t in adapter.state_dict().items())
    assert not all(torch.equal(t, made.adapter.state_dict()[k]) for k, t in load_file(file).items())
    note = json.loads((tmp_path / "second" / "run.json").read_text())["options"]
    assert "| began with | `" in (tmp_path / "second" / "README.md").read_text()
    assert note["start"] == str(file) and note["method"]["name"] == "dylora"


def test_it_is_part_of_what_a_run_is(file, tmp_path):
    def killed(event):
        if event.step == 3:
            raise KeyboardInterrupt

    out, options = tmp_path / "second", {"save_every": 2}
    whole = run(start=file, out=tmp_path / "whole", **options).path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(start=file, out=out, progress=killed, **options)
    other = run(method="dylora:rank=4", targets="q_proj", seed=7, out=tmp_path / "other", steps=2).path
    with pytest.raises(AddendaError, match=r"checkpoint-2 belongs to another run: start was '?\w{12}.*, now"):
        run(start=other, out=out, **options)
    with pytest.raises(AddendaError, match=r"belongs to another.*start was"):
        run(method="dylora:rank=4", targets="q_proj", seed=7, out=out, **options)
    shutil.copy(file, tmp_path / "moved.safetensors")  # the file's bytes count, not its place
    again = run(start=tmp_path / "moved.safetensors", out=out, **options)
    assert again.resumed_from == 2 and again.path.read_bytes() == whole


def test_what_does_not_agree_is_refused_and_leaves_no_mark(file, tmp_path):
    before = {k: t.clone() for k, t in make_llama().state_dict().items()}
    for options, says in [
        ({"method": "lora"}, r"is an adapter of DyLoRA.*method= says LoRA"),
        ({"method": "dylora:rank=8"}, "is an adapter of DyLoRA.*method= says DyLoRA.*rank=8"),
        ({"targets": "v_proj"}, "it is on 2 places and the call names 2; 4 differ"),
        ({"exclude": ["model.layers.0.*"], "targets": "q_proj"}, "on 2 places and the call names 1; 1 differ"),
        ({"also_train": ["norm"]}, r"its heads are none, and also_train= names model\.norm"),
        ({"add_tokens": ["<x>"]}, "add_tokens= are new"),
        ({"head_bits": 2}, "head_bits=2 is not that of its heads, None"),
        ({"model": make_llama(1)}, "trained on"),
        ({"model": make_llama().bfloat16()}, r"its base was in float32, this one is in bfloat16 \(give dtype=\)"),
        ({"out": file.parent}, "is a file of this very run"),
        ({"start": tmp_path / "none.safetensors"}, "There is no file"),
        ({"start": file.parent / "run.json"}, "damaged or no adapter file"),
    ]:
        model = options.pop("model", None) or make_llama()
        own = {k: t.clone() for k, t in model.state_dict().items()}
        with pytest.raises(AddendaError, match=says):
            run(model, **({"start": file} | options))
        assert own.keys() == model.state_dict().keys() == before.keys()
    coded = run(method="lora:rank=2,bits=1", out=tmp_path / "coded", steps=1).path
    with pytest.raises(AddendaError, match=r"holds its matrices as codes.*checkpoint"):
        run(start=coded)
    kept = next((tmp_path / "coded" / "checkpoints").glob("checkpoint-*")) / "adapter.safetensors"
    assert run(start=kept, method="lora:rank=2,bits=1", steps=1).steps == 1
    agreed = run(start=file, method="dylora:rank=4", targets="q_proj", also_train=[])
    assert agreed.steps == 3


def test_heads_and_classes_are_the_files(tmp_path):
    first = run(make_bert(), SPAM, method="lora:rank=2", out=tmp_path / "first")
    assert first.adapter.labels == ("ham", "spam")
    again = run(make_bert(), SPAM[::-1], start=first.path)
    assert again.adapter.labels == ("ham", "spam")
    assert set(again.adapter.methods) == set(first.adapter.methods)
    other = [row | {"label": row["label"].replace("ham", "eggs")} for row in SPAM]
    with pytest.raises(AddendaError, match="eggs"):
        run(make_bert(), other, start=first.path)
    with pytest.raises(AddendaError, match="its heads are"):
        run(make_bert(), SPAM, start=first.path, also_train=["pooler"])
