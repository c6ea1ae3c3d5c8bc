"""`addenda bundle`: a file for a transfer, and what is refused before the model is read."""

import json

import pytest

import addenda as ad
from addenda.transferring.bundle import read_bundle
from shared import call, stir


@pytest.fixture
def folder(tmp_path):
    from lister import make_lister

    model, tokenizer = make_lister()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stir(ad.attach(model, "lora:rank=2", name="a"), 0.3, 1).save(tmp_path / "a.safetensors")
    rows = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(4) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_bundle_is_written_and_says_that_its_seeds_are_task_data(folder, capsys):
    given = ["--adapter", folder / "a.safetensors", "--model", folder / "model", "--data", folder / "sums.jsonl"]
    more = ["--answers", "y,n", "--steps", "2", "--batch", "8", "--seeds", "3", "--count", "12"]
    call("bundle", *given, *more, "--out", folder / "sums.bundle")
    said = capsys.readouterr()
    found = read_bundle(folder / "sums.bundle")
    assert found.name == "sums" and len(found.seeds) == 3 and found.count == 12
    assert "3 seeds of 12 inputs" in said.out and "word for word" in said.out and "sums.bundle" in said.out
    assert "step 2 of 2: held out" in said.err
    call("inspect", folder / "sums.bundle")
    assert "3 seeds of 12 inputs" in capsys.readouterr().out


def test_what_cannot_be_is_said_before_the_model_is_read(folder, capsys, monkeypatch):
    monkeypatch.setattr("addenda.models.load.load_model", lambda *_, **__: pytest.fail("the model was read"))
    a, out, data = folder / "a.safetensors", folder / "x", folder / "sums.jsonl"
    for given, why in (
        (["--adapter", a, "--out", a, "--data", data], "has not written it"),
        (["--adapter", folder / "none", "--out", out, "--data", data], "There is no file"),
        (["--adapter", a, "--out", out, "--data", folder / "none.jsonl"], "none.jsonl"),
        (["--adapter", a, "--out", out, "--data", data, "--seeds", "0"], "--seeds must be"),
    ):
        call("bundle", *given, code=2)
        assert why in capsys.readouterr().err
    assert not out.exists()


def test_words_of_several_tokens_are_told_in_the_commands_own_words(folder, capsys):
    given = ["--adapter", folder / "a.safetensors", "--model", folder / "model", "--data", folder / "sums.jsonl"]
    call("bundle", *given, "--out", folder / "x", code=2)
    assert "'yes' is 3 tokens" in (said := capsys.readouterr().err) and "--answers true,false" in said
