"""New tokens of a run: trained, in the file, and the tokenizer beside it."""

import pytest
import torch
from transformers import AutoTokenizer

import addenda as ad
from addenda.cli.evaluate import with_adapter
from addenda.core.base.errors import AddendaError
from addenda.models.load import load_model
from addenda.train.evaluate import evaluate
from marks import differences, snapshot
from shared import bits, same_bits
from tiny_models import SUMS, make_llama, make_tokenizer

DATA = [{"question": s["question"] + "<call>", "answer": "<call>" + s["answer"]} for s in SUMS[:16]]
QUICK = {"steps": 3, "batch": 4, "rate": 1e-2, "dtype": "float32", "progress": False, "add_tokens": ["<call>"]}


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("targets", [None, "*.q_proj", ["*.q_proj", "*.v_proj"]])
def test_new_tokens_are_trained_saved_and_used_again(targets, folder, tmp_path):
    made = ad.tune(folder, DATA, "lora:rank=2", targets=targets, out=tmp_path / "run", **QUICK)
    moved = {path for path, t in made.adapter.sites() if t.method.name == "trainable-tokens"}
    assert moved == {"model.embed_tokens", "lm_head"}
    assert all(t.tensors()["values"].any() for path, t in made.adapter.sites() if path in moved)
    assert made.adapter.vocabulary.tokens == {"<call>": 76}
    kept = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert kept("<call>").input_ids == made.tokenizer("<call>").input_ids == [76]
    again = with_adapter(folder, made.path, "float32", None)
    assert evaluate(again.model, again.tokenizer, DATA).loss == evaluate(made.model, made.tokenizer, DATA).loss
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert ad.tune(folder, DATA, "lora:rank=2", targets=targets, out=tmp_path / "run", **QUICK).resumed_from == 3
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_whole_table_that_is_trained_takes_the_place_of_its_rows(folder):
    made = ad.tune(folder, DATA, "lora:rank=2", also_train=["embed_tokens", "lm_head"], **QUICK)
    assert {m.name for m in made.adapter.methods.values()} == {"lora", ""}


def test_without_its_tokenizer_a_file_of_new_tokens_is_refused(folder, tmp_path):
    made = ad.tune(folder, DATA, "lora:rank=2", out=tmp_path / "run", **QUICK)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(made.path.read_bytes())
    with pytest.raises(AddendaError, match=r"'<call>', which is number 76 there, and there is none here.*'tokenizer'"):
        with_adapter(folder, alone, "float32", None)
    make_tokenizer().save_pretrained(tmp_path / "run" / "tokenizer")
    with pytest.raises(AddendaError, match="is not the tokenizer with the new tokens of this run"):
        ad.tune(folder, DATA, "lora:rank=2", out=tmp_path / "run", **QUICK)


def test_a_call_that_fails_leaves_a_loaded_model_as_it_was(folder):
    loaded = load_model(folder, dtype="float32")
    before, told = bits(loaded.model), snapshot(loaded.model)

    def stop(event):
        raise KeyboardInterrupt

    options = QUICK | {"progress": stop, "tokenizer": loaded.tokenizer}
    del options["dtype"]
    with pytest.raises(KeyboardInterrupt):
        ad.tune(loaded.model, DATA, "lora:rank=2", **options)
    assert same_bits(bits(loaded.model), before)
    assert differences(told, snapshot(loaded.model)) == []
    assert loaded.model(torch.tensor([[5]])).logits.shape[-1] == 76


def test_a_call_that_fails_leaves_the_tokenizer_as_it_was(folder):
    loaded = load_model(folder, dtype="float32")
    tokenizer, before = loaded.tokenizer, (len(loaded.tokenizer), loaded.tokenizer("a<call>b")["input_ids"])
    options = {k: v for k, v in QUICK.items() if k != "dtype"} | {"tokenizer": tokenizer, "max_length": 8}
    with pytest.raises(AddendaError, match="longer than"):
        ad.tune(loaded.model, [{"question": "1+1=?" * 9, "answer": "2"}] * 4, "lora:rank=2", **options)
    assert (len(tokenizer), tokenizer("a<call>b")["input_ids"]) == before
    ad.generate(loaded.model, tokenizer, ["a<call>b"], max_new_tokens=2)


def test_what_is_no_list_of_tokens_is_refused_before_the_model_is_read(tmp_path):
    for wrong in ("<call>", [""], [3]):
        with pytest.raises(AddendaError, match="tokens is a list of texts"):
            ad.tune(tmp_path / "none", DATA, "lora", **(QUICK | {"add_tokens": wrong}))
