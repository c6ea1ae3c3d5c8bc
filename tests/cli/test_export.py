"""`addenda export` and `addenda import`: what they write, and what they refuse in words of the command line."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import addenda as ad
from shared import call, stir
from tiny_models import make_bert, make_llama, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    stir(ad.attach(make_llama(), "lora:rank=2"), 0.3).save(tmp_path / "a.safetensors")
    return tmp_path


def everything(place):
    return sorted(p.name for p in place.iterdir())


def test_there_and_back(folder, capsys):
    common = ["--model", folder / "model", "--out"]
    call("export", folder / "a.safetensors", "--to", "vllm", *common, folder / "out")
    said = capsys.readouterr().out
    assert "vllm: 14 sites as LoRA" in said and "read back" in said and max(map(len, said.splitlines()[:3])) <= 80
    call("import", folder / "out", "--dtype", "float32", *common, folder / "b.safetensors")
    ids, logits = torch.arange(3, 15)[None], []
    for name in ("a", "b"):
        model = make_llama()
        ad.load(model, folder / f"{name}.safetensors")
        with torch.no_grad():
            logits.append(model(ids).logits)
    with torch.no_grad():
        assert float((logits[0] - make_llama()(ids).logits).abs().max()) > 1e-2
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5


def test_a_merged_folder_has_the_tokenizer_wherever_the_model_is_named_from(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    call("export", "a.safetensors", "--to", "merged", "--model", "model", "--out", "out")
    assert {"tokenizer.json", "config.json"} <= set(everything(folder / "out"))
    assert "model shards" not in capsys.readouterr().err
    assert transformers.AutoTokenizer.from_pretrained(folder / "out")("12")["input_ids"]


def test_a_file_of_several_models_is_read_by_part(folder, capsys):
    call("export", folder / "a.safetensors", "--to", "kohya", "-m", folder / "model", "-o", folder / "k.safetensors")
    tensors = load_file(folder / "k.safetensors")
    more = {"lora_te1_x.lora_down.weight": torch.ones(2, 4), "lora_te1_x.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors | more, folder / "two.safetensors")
    common = [folder / "two.safetensors", "-m", folder / "model", "-o", folder / "b.safetensors"]
    call("import", *common, code=2)
    assert "--part lycoris" in capsys.readouterr().err
    call("import", *common, "--part", "lycoris")
    assert (folder / "b.safetensors").is_file()


def test_a_head_of_another_size_than_asked_for(folder, capsys):
    make_bert(labels=3).save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    adapter = stir(ad.attach(make_bert(labels=3), "lora:rank=2", also_train=["classifier"]), 0.3)
    ad.export(adapter, "peft", folder / "out")
    common = [folder / "out", "-m", folder / "bert", "-o", folder / "b.safetensors"]
    call("import", *common, "--labels", 2, code=2)
    assert "has 3 outputs, and --labels 2" in capsys.readouterr().err and not (folder / "b.safetensors").exists()


BAD = {
    "no door": (["--to", "pefd"], "Did you mean 'peft'"),
    "unread": (["--to", "peft", "--uniform"], "--uniform is not read with --to peft"),
    "a place below a file": (["--to", "peft", "--out", "FOLDER/a.safetensors/x"], "is no folder"),
    "taken": (["--to", "peft", "--out", "FOLDER/model"], "there already"),
    "range": (["--to", "peft", "--rank", 0], "--rank must be"),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_are_told_before_the_model_is_read(what, folder, capsys, monkeypatch):
    monkeypatch.setattr("addenda.cli.export.with_adapter", None)
    given, says = BAD[what]
    given = ["--out", folder / "out", *(str(g).replace("FOLDER", str(folder)) for g in given)]
    call("export", folder / "a.safetensors", "--model", folder / "model", *given, code=2)
    assert says in capsys.readouterr().err and everything(folder) == ["a.safetensors", "model"]


def test_inspect_for_vllm_wants_what_vllm_reads(folder, capsys):
    call("inspect", folder / "a.safetensors", "--for", "vllm", code=2)
    assert "reads folders of PEFT" in capsys.readouterr().err
    ad.export(stir(ad.attach(make_llama(), "dora:rank=2"), 0.3), "peft", folder / "out")
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["use_dora"]
    call("inspect", folder / "out", "--for", "vllm", code=2)
    said = capsys.readouterr()
    assert "vLLM would not serve this" in said.err and ".." not in said.err
    assert all(len(line) <= 80 for line in said.out.splitlines())
