"""`addenda reduce`: one file of several, its table in 80 columns, and what is refused before the model is read."""

import pytest
import torch

import addenda as ad
from shared import call, stir
from tiny_models import make_llama, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model = make_llama()
    for name, method in (("one", "loha:rank=2"), ("two", "oft:block=4"), ("hidden", "pfeiffer:rank=4")):
        stir(ad.attach(model, method, name=name), 0.3).save(tmp_path / f"{name}.safetensors")
        ad.detach(model)
    (tmp_path / "words.txt").write_text(" ".join(f"{i} + {i + 1} = {2 * i + 1}" for i in range(400)))
    return tmp_path


def test_two_files_become_one(folder, capsys):
    out, ids = folder / "sum.safetensors", torch.arange(3, 15)[None]
    files = folder / "one.safetensors", folder / "two.safetensors"
    common = ["--model", folder / "model", "--dtype", "float32"]
    call("reduce", *files, *common, "--to", "lora", "--energy", 0.999, "--out", out)
    shown = capsys.readouterr().out
    assert "sites as lora" in shown and "top-1 agreement" in shown and f"written: {out}" in shown
    assert max(map(len, shown.partition("written")[0].splitlines())) <= 80
    model = make_llama().eval()
    with torch.no_grad():
        base = model(ids).logits
        for i, file in enumerate(files):
            ad.load(model, file, name=str(i), activate=False)
        ad.switch(model, ["0", "1"])
        live = model(ids).logits
        ad.detach(model)
        ad.load(model, out)
        made = model(ids).logits
    assert float((made - live).norm()) < 0.1 * float((live - base).norm())
    call("reduce", files[0], *common, "--to", "sparse", "--density", 0.1, "--out", out, code=2)
    assert "is there already" in capsys.readouterr().err


def test_text_to_weigh_by(folder, capsys):
    common = [
        folder / "one.safetensors",
        "--model",
        folder / "model",
        "--dtype",
        "float32",
        "--to",
        "lora",
        "--rank",
        1,
    ]
    more = ["--weigh", folder / "words.txt", "--samples", 4, "--length", 16]
    call("reduce", *common, *more, "--out", folder / "weighed.safetensors")
    shown = capsys.readouterr()
    assert "* of the outputs' energy on the batches" in shown.out and "weighed by 4 windows (64 tokens)" in shown.err
    assert ad.inspect(folder / "weighed.safetensors").startswith("lora (rank=1)") or "rank=1" in ad.inspect(
        folder / "weighed.safetensors"
    )


BAD = {
    "no form": (["--to", "loar"], "Did you mean 'lora'"),
    "unread": (["--to", "lora", "--density", 0.1], "--density is not read"),
    "unread words": (["--to", "lora", "--samples", 3], "--samples is not read without texts"),
    "range": (["--to", "lora", "--rank", 0], "rank must be"),
    "neither": (["--to", "sparse"], "--density or --count"),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_are_told_before_the_model_is_read(what, folder, capsys, monkeypatch):
    monkeypatch.setattr("addenda.cli.reduce.with_adapter", None)
    given, says = BAD[what]
    call("reduce", folder / "one.safetensors", *given, "--out", folder / "new.safetensors", code=2)
    assert says in capsys.readouterr().err and not (folder / "new.safetensors").exists()


def test_hidden_methods_and_doubles_too(folder, capsys, monkeypatch):
    monkeypatch.setattr("addenda.cli.reduce.with_adapter", None)
    one, hidden = folder / "one.safetensors", folder / "hidden.safetensors"
    call("reduce", one, hidden, "--to", "lora", "--rank", 1, "--out", folder / "new.safetensors", code=2)
    assert "holds pfeiffer, which changes activations" in capsys.readouterr().err
    call("reduce", one, one, "--to", "lora", "--rank", 1, "--out", folder / "new.safetensors", code=2)
    assert "named twice" in capsys.readouterr().err


def test_the_base_is_read_in_the_dtype_of_training_unless_another_is_given(folder, capsys, monkeypatch):
    monkeypatch.setattr("addenda.models.load.pick_dtype", _never_auto)
    common = [folder / "one.safetensors", "--model", folder / "model", "--to", "lora", "--rank", 1, "--out"]
    call("reduce", *common, folder / "new.safetensors")
    assert "sites as lora" in capsys.readouterr().out
    call("reduce", *common, folder / "other.safetensors", "--dtype", "bfloat16", code=2)
    assert "--base compatible" in capsys.readouterr().err


def _never_auto(dtype, where):
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype], "as given"
