"""`addenda extract`."""

import pytest
import torch
import transformers

import addenda as ad
from shared import call
from tiny_models import make_llama


@pytest.fixture
def folders(tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path


def test_extract_and_what_it_says(folders, capsys):
    given = ("--base", folders / "base", "--tuned", folders / "tuned", "--out", folders / "x.safetensors")
    call("extract", *given, "--to", "lora", "--rank", "32")
    said = capsys.readouterr().out
    assert "16 weights as lora" in said and "outputs:" in said and f"written: {folders / 'x.safetensors'}" in said
    model = transformers.LlamaForCausalLM.from_pretrained(folders / "base")
    ad.load(model, folders / "x.safetensors")
    tuned, ids = transformers.LlamaForCausalLM.from_pretrained(folders / "tuned"), torch.arange(1, 13)[None]
    assert (model(ids).logits - tuned(ids).logits).abs().max() < 1e-5
    call("extract", *given, code=2)
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("form", [("sparse", "--density", "0.1"), ("sparse", "--count", "5"), ("bits", "--bits", "2"),
                                  ("lora", "--energy", "0.9"), ("patch",)])  # fmt: skip
def test_every_form(folders, capsys, form):
    call("extract", "--base", folders / "base", "--tuned", folders / "tuned", "-o", folders / "x.safetensors", "--to",
         *form, "--no-check")  # fmt: skip
    said = capsys.readouterr().out
    assert f"16 weights as {form[0]}" in said and "not compared" in said
    assert ad.load(make_llama(), folders / "x.safetensors").methods


def test_a_refusal_is_a_sentence(folders, capsys):
    call("extract", "--base", folders / "base", "--tuned", folders / "none", "-o", folders / "x.safetensors", code=2)
    assert "no such folder" in capsys.readouterr().err and not (folders / "x.safetensors").exists()


def test_options_and_places_are_told_in_words_of_the_command_line(folders, capsys):
    given = ("--base", folders / "base", "--tuned", folders / "tuned", "-o")
    call("extract", *given, folders / "base", code=2)
    assert "Choose another --out" in capsys.readouterr().err
    call("extract", *given, folders / "base" / "config.json" / "x", code=2)
    assert "config.json is no folder. Choose another --out" in capsys.readouterr().err
    call("extract", *given, folders / "x.safetensors", "--bits", 2, code=2)
    said = capsys.readouterr().err
    assert "--bits is not read with --to lora, which reads --rank, --energy." in said
