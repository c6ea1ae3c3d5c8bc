"""`addenda combine`: a file of several, its table, and what is refused before the model is read."""

import pytest
import torch

import addenda as ad
from addenda.core.file.header import read
from addenda.models.load import load_model
from shared import call, stir


@pytest.fixture
def folder(tmp_path):
    from tiny_models import make_llama, make_tokenizer

    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for n, targets in (("a", "linear"), ("b", "linear"), ("few", "*q_proj")):
        stir(ad.attach(model, "lora:rank=2", targets=targets, name=n), 0.3, ord(n[0])).save(
            tmp_path / f"{n}.safetensors"
        )
        ad.detach(model)
    return tmp_path


def test_the_file_is_an_ordinary_adapter_and_the_table_fits(folder, capsys):
    out, both = folder / "new.safetensors", [folder / "a.safetensors", folder / "b.safetensors"]
    call("combine", *both, "--model", folder / "model", "--how", "linear", "--weights", "0.5,0.5", "--out", out)
    said = capsys.readouterr().out
    assert max(map(len, said.replace(str(folder), "").splitlines())) <= 80 and "0.5 × a, 0.5 × b" in said
    model = load_model(folder / "model", dtype="float32").model
    ids = torch.arange(6)[None]
    for name in ("a", "b"):
        ad.load(model, folder / f"{name}.safetensors", name=name, activate=False)
    report = ad.combine(["a", "b"], model=model, how="linear")
    ad.switch(model, "combined")
    want = model(ids).logits
    ad.detach(model)
    ad.load(model, out)
    assert torch.equal(model(ids).logits, want) and len(report.sites) == len(read(out)[0].sites)
    call("inspect", out)
    assert "lora" in capsys.readouterr().out
    other = folder / "ties.safetensors"
    call("combine", *both, "--model", folder / "model", "--how", "ties", "--density", "0.5", "--out", other)
    assert "ties" in capsys.readouterr().out


def test_what_cannot_be_is_said_before_the_model_is_read(folder, capsys):
    a, b, few = (folder / f"{n}.safetensors" for n in ("a", "b", "few"))
    foreign = folder / "notes.safetensors"
    foreign.write_text("mine")
    held = foreign.read_bytes(), a.read_bytes(), few.read_bytes()
    cases = {
        "notes.safetensors is there already": (a, b, "--out", foreign),
        "few.safetensors is there already": (a, b, "--out", few),  # an adapter, trained for hours perhaps
        "a.safetensors is there already": (a, b, "--out", a),
        "2 adapters want 2 weights": (a, b, "--out", folder / "x", "--weights", "1"),
        "are numbers": (a, b, "--out", folder / "x", "--weights", "1,one"),
        "finite": (a, b, "--out", folder / "x", "--weights", "1,nan"),
        "--density must be": (a, b, "--out", folder / "x", "--how", "ties", "--density", "2"),
        "does not read --density": (a, b, "--out", folder / "x", "--density", "0.5"),
        "nothing at": (a, few, "--out", folder / "x"),
        "twice": (a, a, "--out", folder / "x"),
        "There is no --how tis": (a, b, "--out", folder / "x", "--how", "tis"),
        "There is no file": (a, folder / "none.safetensors", "--out", folder / "x"),
    }
    for message, arguments in cases.items():
        call("combine", *arguments, "--model", folder / "no-model", code=2)
        assert message in capsys.readouterr().err, message
    assert (foreign.read_bytes(), a.read_bytes(), few.read_bytes()) == held and not (folder / "x").exists()


def test_files_of_one_name_are_told_apart_by_their_folders(folder, capsys):
    files = []
    for n in ("a", "b"):
        (folder / f"run-{n}").mkdir()
        files.append((folder / f"{n}.safetensors").rename(folder / f"run-{n}" / "adapter.safetensors"))
    out, other = folder / "both.safetensors", folder / "other.safetensors"
    call("combine", *files, "--model", folder / "model", "--how", "linear", "--out", out)
    assert "0.5 × run-a/adapter, 0.5 × run-b/adapter" in " ".join(capsys.readouterr().out.split())
    call("combine", *files, "--model", folder / "model", "--heads-of", "run-b/adapter", "--out", other, code=2)
    assert "--heads-of run-b/adapter has no heads" in capsys.readouterr().err
    call("combine", files[0], files[0], "--model", folder / "model", "--out", other, code=2)
    assert "'adapter' is there twice" in capsys.readouterr().err


def test_a_name_has_as_many_folders_as_it_takes():
    from pathlib import Path

    from addenda.combining.sources import names_of

    found = names_of([Path(p) for p in ("x/run/ad.safetensors", "y/run/ad.safetensors", "z/ad.safetensors", "b.st")])
    assert found == ["x/run/ad", "y/run/ad", "z/ad", "b"]
