"""New rows in a file: what a header may say of them, and that no claim of it costs memory."""

import json
import resource
import time

import pytest
import torch

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.file.inspect import inspect
from shared import bits, read_raw, same_bits, stir, write_raw

TABLE = "model.embed_tokens.weight"


@pytest.fixture
def good(tmp_path):
    """A file of a LoRA on a model with two new rows, which nobody trained."""
    model = toys.make_llama()
    with torch.no_grad():
        model.resize_token_embeddings(34, mean_resizing=False)
    ad.grow(model, base_rows=32)
    return stir(ad.attach(model, "lora:rank=2", targets="*.q_proj")).save(tmp_path / "good.safetensors")


def test_rows_that_nobody_trained_are_in_the_file_with_their_bits(good):
    header, tensors = read(good)
    assert header.vocabulary is not None
    assert (header.vocabulary.base_rows, header.vocabulary.rows) == (32, 2)
    assert header.vocabulary.tables == (TABLE,)
    model = toys.make_llama()
    ad.load(model, good)
    assert torch.equal(model.get_input_embeddings().weight[32:], tensors[f".new/{TABLE}"])
    assert "2 rows behind the base's 32" in inspect(good)


CLAIMS = {
    "giant base": {"base_rows": 2**39},
    "giant count": {"rows": 2**39},
    "past any count": {"rows": 2**60},
    "no base": {"base_rows": 0},
    "a truth for a number": {"rows": True},
    "fewer rows than there are": {"rows": 1},
    "rows and no table": {"tables": []},
    "a table twice": {"tables": [TABLE, TABLE]},
    "another table": {"tables": ["lm_head.weight"]},
    "many tables": {"tables": [f"t{i}" for i in range(9)]},
    "a table that is no text": {"tables": [["a"]]},
    "an unknown key": {"pickle": 1},
    "tokens as a list": {"tokens": ["<a>"]},
    "a token behind the rows": {"tokens": {"<a>": 34}},
    "a token below them": {"tokens": {"<a>": -1}},
    "two tokens of one number": {"tokens": {"<a>": 33, "<b>": 33}},
    "a hash that is none": {"tokenizer": "x" * 64, "entries": 34},
    "a hash without a count": {"tokenizer": "0" * 64},
    "no rows at all": {"rows": 0},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_cannot_be_is_refused_at_no_cost(claim, good, tmp_path):
    header, tensors = read_raw(good)
    header["vocabulary"] |= CLAIMS[claim]
    write_raw(tmp_path / "bad.safetensors", header, tensors)
    model = toys.make_llama()
    before, memory, began = bits(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(AddendaError):
        ad.load(model, tmp_path / "bad.safetensors")
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10, "more than 64 MiB"
    assert same_bits(bits(model), before)
    assert model.config.vocab_size == 32


def test_rows_that_are_no_numbers_or_not_finite_are_refused(good, tmp_path):
    header, tensors = read_raw(good)
    rows = tensors[f".new/{TABLE}"]
    for wrong in (rows * float("nan"), rows.to(torch.int64), rows[None], rows[:, :4]):
        write_raw(tmp_path / "bad.safetensors", header, tensors | {f".new/{TABLE}": wrong.contiguous()})
        with pytest.raises(AddendaError, match="new rows"):
            ad.load(toys.make_llama(), tmp_path / "bad.safetensors")


def test_the_header_says_only_what_is_known(good):
    header, _ = read_raw(good)
    assert header["vocabulary"] == {"base_rows": 32, "rows": 2, "tables": [TABLE], "tokens": {}}
    assert json.loads(json.dumps(header)) == header
