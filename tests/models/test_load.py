"""Folders of models that are damaged: one sentence with the place and what to do, whatever is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from addenda.cli.main import run
from addenda.core.base.errors import AddendaError
from addenda.models.load import load_model
from tiny_models import make_llama, make_tokenizer


def said(**entries):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def written(name: str, text: bytes):
    return lambda folder: (folder / name).write_bytes(text)


def weights(change):
    def write(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def indexed(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


CASES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "cut config": (written("config.json", b'{"model_type"'), r"config\.json"),
    "a list": (written("config.json", b"[]"), r"config\.json"),
    "deep config": (written("config.json", b'{"a":' * 3000 + b"1" + b"}" * 3000), r"config\.json"),
    "no utf-8": (written("config.json", b"\xff\xfe{}"), r"config\.json"),
    "unknown architecture": (said(model_type="nothing"), r"nothing.*Mend|config\.json"),
    "hidden size": (said(hidden_size="abc"), "abc|hidden_size"),
    "shapes": (said(intermediate_size=48), r"mlp\.\w+\.weight.*other shapes|other shapes.*mlp\.\w+\.weight"),
    "cut weights": (cut, "damaged.*Get it again"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "Get its files again"),
    "noise": (written("model.safetensors", b"\x00" * 64), "damaged.*Get it again"),
    "pickle": (pickled, "pickles, which can run code.*safe_serialization=True"),
    "missing shard": (indexed, "Get the folder again"),
    "nan": (weights(lambda t: t["model.norm.weight"].fill_(float("nan"))), r"not finite: model\.norm\.weight"),
    "infinite": (weights(lambda t: t["model.norm.weight"][0].fill_(float("inf"))), r"not finite: model\.norm\.weight"),
    "no tokenizer": (without_tokenizer, "could not be loaded"),
    "cut tokenizer": (written("tokenizer.json", b"{"), "could not be loaded"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_folder_is_an_error_with_its_place(sound, tmp_path, capsys, case):
    damage, expected = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    damage(folder)
    with pytest.raises(AddendaError, match=expected) as caught:
        load_model(folder, dtype="float32")
    assert str(folder) in str(caught.value)
    assert "above report" not in str(caught.value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(["plan", "--model", str(folder)])
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_sound_folder_loads(sound):
    assert load_model(sound, dtype="float32").fresh == ()


@pytest.mark.parametrize("ends", [2, [2, 3]])
def test_a_classifier_of_a_folder_without_padding_fills_with_an_end(tmp_path, ends):
    model, tokenizer = make_llama(), make_tokenizer()
    model.config.pad_token_id, model.config.eos_token_id = None, ends
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, task="label", labels=2, dtype="float32")
    assert loaded.model.config.pad_token_id == 2
