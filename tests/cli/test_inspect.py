"""What others wrote into an adapter file or beside it: shown harmlessly and bounded, or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

import addenda as ad
from shared import call, read_raw, stir, write_raw

LONG = "x" * 100_000
NAMES = ["a\x1b]0;owned\x07", "[/red][bold]", "\u202egnp.exe", "a\nlora (defaults): 1 site\x1b[2J", LONG, "\ud800"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from tiny_models import make_llama, make_tokenizer

    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    ad.save(ad.attach(model, "lora:rank=2", seed=0), tmp_path / "adapter.safetensors")
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1=?", "answer": "2"}\n' * 4)
    return tmp_path


def harmless(capsys) -> str:
    said = capsys.readouterr()
    text = said.out + said.err
    assert not {c for c in text if ord(c) < 32 and c != "\n"} and "\u202e" not in text
    assert len(text) < 20_000
    assert "Traceback" not in text
    return text


def hostile(file, name: str, where: str) -> None:
    header, tensors = read_raw(file)
    first = header["sites"][0]
    if where == "path":
        tensors = {k.replace(f"{first['path']}/", f"{name}/"): t for k, t in tensors.items()}
        first["path"] = name
    elif where == "method":
        header["methods"][0]["name"] = name
    elif where == "option":
        header["methods"][0] = {"name": header["methods"][0]["name"], "options": {name: name}}
    elif where == "labels":
        header["labels"] = [name]
    elif where == "head":
        first |= {"path": name, "method": -1, "shape": [1]}
    else:
        header["sites"] = [first | {"path": f"{name[:50]}{i}.w"} for i in range(2000)]
        one = {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{first['path']}/")}
        tensors = {f"{s['path']}/{k}": t.clone() for s in header["sites"] for k, t in one.items()}
    write_raw(file, header, tensors)


@pytest.mark.parametrize("where", ["path", "method", "option", "labels", "many"])
@pytest.mark.parametrize("name", NAMES[:-1], ids=["title", "markup", "turned", "lines", "long"])
def test_names_of_a_file_are_printed_harmlessly(folder, capsys, name, where):
    file = folder / "adapter.safetensors"
    hostile(file, name, where)
    shown = name[:50] if where == "many" else name
    refused = (where in ("path", "many") and not (shown.isprintable() and len(shown) < 1000)) or (
        where == "labels" and name == LONG
    )
    call("inspect", file, code=2 if refused else 0)
    lines = harmless(capsys).splitlines()
    assert len(lines) == (1 if refused else 4 + (where == "labels")), "no name makes a line of its own"


@pytest.mark.parametrize("name", NAMES[:-1], ids=["title", "markup", "turned", "lines", "long"])
def test_names_in_what_is_refused_are_too(folder, capsys, name):
    file = folder / "adapter.safetensors"
    hostile(file, name, "head")
    call("inspect", file, code=2)
    harmless(capsys)


@pytest.mark.parametrize("where", ["path", "method", "option"])
@pytest.mark.parametrize("name", NAMES[:-1], ids=["title", "markup", "turned", "lines", "long"])
def test_loading_such_a_file_says_so_harmlessly(folder, capsys, name, where):
    hostile(folder / "adapter.safetensors", name, where)
    call("generate", "1+1=?", "--model", folder / "model", "--adapter", folder / "adapter.safetensors", code=2)
    harmless(capsys)


RUNS = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 5000 + "1" + "}" * 5000,
    "nan": '{"options": {"image_size": NaN}}',
    "text": '"run"',
    "list": "[1, 2]",
    "number of digits": '{"options": {"image_size": ' + "9" * 5000 + "}}",
    "options": '{"options": [1], "data": "x"}',
    "size": '{"options": {"image_size": "224"}}',
    "negative": '{"options": {"image_size": -1}}',
    "labels": '{"data": {"labels": {"a": 1}}}',
    "labels of numbers": '{"data": {"labels": [1, null]}}',
    "bytes": "\x00\xff",
}


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS)
def test_a_hostile_run_beside_an_adapter(folder, capsys, text):
    """What is no run of addenda's says nothing: the adapter is read as if it stood alone."""
    (folder / "run.json").write_text(text)
    model = ("--model", folder / "model", "--adapter", folder / "adapter.safetensors", "--dtype", "float32")
    call("generate", "1+1=?", "--max-new-tokens", 1, *model)
    call("eval", *model, "--data", folder / "sums.jsonl", "--split", "train")
    harmless(capsys)


@pytest.mark.parametrize("form", ["\x1b[2J", "[/red]", LONG, "nf5"], ids=["esc", "markup", "long", "unknown"])
def test_a_form_that_a_run_names_is_refused_harmlessly(folder, capsys, form):
    (folder / "run.json").write_text(json.dumps({"options": {"quantize": form}}))
    call("generate", "1+1=?", "--model", folder / "model", "--adapter", folder / "adapter.safetensors", code=2)
    harmless(capsys)


def peft_folder(folder, weights="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "b"}))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: torch.zeros(2, 32)}, folder / weights)
    return folder


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("option", ["--model", "--adapter"])
def test_an_adapter_of_peft_is_called_one(folder, capsys, name, option):
    theirs = peft_folder(folder / "peft") / name
    model = ("--model", folder / "model") if option == "--adapter" else ()
    call("generate", "1+1=?", *model, option, theirs, code=2)
    said = harmless(capsys)
    assert "is an adapter of PEFT" in said and "addenda import" in said and "Did you mean" not in said


def test_the_weights_of_one_alone_are_called_so_too(folder, capsys):
    theirs = peft_folder(folder / "peft", "renamed.safetensors")
    (theirs / "adapter_config.json").unlink()
    call("inspect", theirs / "renamed.safetensors", code=2)
    assert "is an adapter of PEFT" in harmless(capsys)


@pytest.mark.parametrize("command", ["generate", "eval", "tune", "compare", "compress"])
def test_a_model_with_an_adapter_of_peft_beside_it_is_refused(folder, capsys, command):
    """transformers would put it on the model without a word."""
    peft_folder(folder / "model")
    data = ("--data", folder / "sums.jsonl")
    more = {"generate": ("1+1=?",), "eval": data, "tune": (*data, "--out", folder / "out")}
    more |= {"compare": (*data, "--out", folder / "out"), "compress": ("--out", folder / "out")}
    call(command, *more[command], "--model", folder / "model", code=2)
    said = harmless(capsys)
    assert "holds a model and an adapter of PEFT" in said and "adapter_config.json" in said
    assert not (folder / "out").exists()


def test_a_folder_is_checked_by_the_rules_of_vllm(tmp_path, capsys):
    from tiny_models import make_llama

    model = make_llama()
    model.save_pretrained(tmp_path / "base")
    adapter = stir(ad.attach(model, "lora:rank=1"))
    ad.export(adapter, "vllm", tmp_path / "good")
    ad.export(adapter, "peft", tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    capsys.readouterr()  # transformers' bars
    call("inspect", tmp_path / "good", "--for", "vllm", "--model", tmp_path / "base")
    assert "nothing keeps it from being served" in harmless(capsys)
    call("inspect", tmp_path / "wide", "--for", "vllm", code=2)
    assert "DoRA" in harmless(capsys)
    call("inspect", tmp_path / "good", "--for", "gguf", code=2)
    call("inspect", tmp_path / "good", "--max-lora-rank", 8, code=2)
    assert "without --for" in harmless(capsys)
