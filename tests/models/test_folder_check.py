"""Folders of models that no library should be given: refused before anything in them is opened or made room for."""

import json
import pickle
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from addenda.core.base.errors import AddendaError
from addenda.models.checkpoint_files import CheckpointFiles
from addenda.models.folder_check import check_folder
from addenda.models.load import load_model
from tiny_models import make_llama, make_tokenizer

INDEX = "model.safetensors.index.json"
OPENED: list[str] = []
sys.addaudithook(lambda event, _: OPENED.append(event) if event.startswith(("pickle.", "torch.load")) else None)


class Harm:
    """What its pickle does as it is opened."""

    def __reduce__(self):
        return print, ("a pickle was opened",)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    make_llama().save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


def said(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def index(folder, **places):
    """An index that puts all weights into one file, or those named elsewhere."""
    names = load_file(folder / "model.safetensors")
    other = places.pop("all", "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, other) | places}))


def refused(folder, match, capfd):
    OPENED.clear()
    started = time.perf_counter()
    with pytest.raises(AddendaError, match=match) as caught:
        load_model(folder, dtype="float32")
    assert time.perf_counter() - started < 1
    assert not OPENED
    assert "opened" not in capfd.readouterr().out
    assert str(folder) in str(caught.value)


PICKLES = [
    ("pytorch_model.bin",), ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"), ("model.pt",),
    ("consolidated.00.pth",), ("model.ckpt",), ("weights.pkl",), ("tf_model.h5",), ("flax_model.msgpack",),
    ("adapter_model.bin",), ("rust_model.ot",),
]  # fmt: skip


@pytest.mark.parametrize("names", PICKLES, ids=lambda n: n[0])
def test_pickles_alone(folder, capfd, names):
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"{}" if name.endswith("json") else pickle.dumps(Harm()))
    refused(folder, r"model\.save_pretrained\(new, safe_serialization=True\)", capfd)


def test_a_pickle_beside_safetensors_is_left_alone(folder):
    """Many folders hold both, and what a trainer noted; an index without shards does not choose the pickle either."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Harm()))
    OPENED.clear()
    assert load_model(folder, dtype="float32").model.config.hidden_size == 32
    assert not OPENED


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.safetensors", "../x.safetensors", 7, ""])
def test_a_configuration_that_names_its_weights(folder, capfd, name):
    """transformers opens the pickle adapter_model.bin where config.json says so, use_safetensors=True or not."""
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    said(folder, transformers_weights=name)
    refused(folder, "transformers_weights", capfd)


PLACES = [
    "pytorch_model.bin", "../x.safetensors", "/x.safetensors", "a/b.safetensors", ".safetensors", "no.safetensors", "",
]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_an_index_that_leads_elsewhere(folder, capfd, name):
    """transformers opens what it names, in any folder, as a pickle where the name does not end as safetensors do."""
    index(folder, all=name)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    refused(folder, "index.json", capfd)
    with pytest.raises(AddendaError):
        CheckpointFiles.of(folder)


CLAIMS = {
    "width": {"intermediate_size": 10**9}, "vocabulary": {"vocab_size": 2**40}, "layers": {"num_hidden_layers": 10**9},
    "many digits": {"num_hidden_layers": 10**400}, "labels": {"num_labels": 10**9},
    "inside": {"text_config": {"num_hidden_layers": 10**9}}, "a list": {"depths": [2, 10**8]},
    "hidden": {"hidden_size": 2**20, "num_attention_heads": 2**10},
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_configuration_of_a_giant(folder, capfd, claim):
    said(folder, **CLAIMS[claim])
    refused(folder, "claims|do not belong together|numbers", capfd)


def test_masks_count_too(tmp_path):
    """GPT-2 keeps a mask of positions × positions that no file holds."""
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=76)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype="float32").model.config.n_positions == 16
    said(tmp_path, n_positions=10**5)
    with pytest.raises(AddendaError, match="do not belong together"):
        load_model(tmp_path, dtype="float32")


def test_a_long_configuration(folder, capfd):
    said(folder, note="x" * (17 << 20))
    refused(folder, "more than any configuration", capfd)


def test_what_is_no_model_passes(tmp_path):
    check_folder(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    check_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 10**5}))
    with pytest.raises(AddendaError, match="10,000 is the most"):
        check_folder(tmp_path)


TOKENS = {
    "tokenizer_config.json": lambda odd: {"added_tokens_decoder": {"5": {"content": "<odd>", **odd}}},
    "special_tokens_map.json": lambda odd: {"mask_token": {"content": "<odd>", **odd}},
    "tokenizer.json": lambda odd: {"added_tokens": [{"id": 5, "special": True, "content": "<odd>", **odd}]},
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("odd", ["\x1b[31m", "\x9b31m", "a\u202eb", "x" * 1000])
def test_names_that_the_tokenizers_library_would_print_are_refused(folder, capfd, name, odd):
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | TOKENS[name]({odd: 1})))
    refused(folder, "no option of a tokenizer is called so", capfd)
    told = capfd.readouterr()
    assert odd not in told.out + told.err


def test_tokens_that_were_added_are_no_reason_to_refuse(folder):
    from transformers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<\n\x1b>", lstrip=True, special=True), "<more>"])
    tokenizer.save_pretrained(folder)
    assert "<more>" in load_model(folder, dtype="float32").tokenizer.get_vocab()
