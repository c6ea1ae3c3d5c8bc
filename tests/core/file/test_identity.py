"""An identity tells runs apart by everything that decides their numbers, and by nothing else."""

import hashlib

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.identity import base_of, differences, goes_on, larger, longer
from tiny_models import make_llama


def test_weights_are_hashed_by_name_form_and_bytes():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(f"{name}\x1f{tuple(tensor.shape)}\x1f{tensor.dtype}\x1e".encode())
        sha.update(hashlib.sha256(tensor.numpy().tobytes()).digest())
    assert base_of(model)["weights"] == sha.hexdigest()


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_and_tied_tensors_give_one_digest(threads):
    before = torch.get_num_threads()
    model, tied = make_llama(), make_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    apart = make_llama()
    apart.lm_head.weight = nn.Parameter(apart.model.embed_tokens.weight.detach().clone())
    apart.config.tie_word_embeddings = tied.config.tie_word_embeddings
    expected = base_of(model), base_of(tied)
    torch.set_num_threads(threads)
    try:
        assert (base_of(model), base_of(tied)) == expected
        assert base_of(apart)["weights"] == expected[1]["weights"]
    finally:
        torch.set_num_threads(before)


def test_one_bit_another_name_or_shape_is_another_base_and_an_adapter_is_none():
    model = make_llama()
    found = base_of(model)
    ad.attach(model, "lora:rank=2")
    assert base_of(model) == found
    ad.detach(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 2**-20
    assert [d.name for d in differences(found, base_of(model))] == ["weights"]
    a, b = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
    b.weight = nn.Parameter(a.weight.detach().reshape(4, 6))
    assert base_of(a)["weights"] != base_of(b)["weights"]
    on_meta, with_bias = nn.Linear(4, 6, bias=False, device="meta"), nn.Linear(4, 6, device="meta")
    assert len({base_of(m)["weights"] for m in (a, on_meta, with_bias)}) == 3


def test_only_what_may_grow_grows_and_all_else_is_listed():
    there = {"steps": 100, "methods": ["lora"], "data": {"hash": "a" * 64, "rows": 5}}
    now = {"steps": 200, "methods": ("lora", "shira"), "data": {"hash": "a" * 64, "rows": 5}}
    rules = {"steps": larger, "methods": longer}
    grown = goes_on("The run", there, now, grows=rules, way="Choose another.")
    assert {d.name: d.now for d in grown} == {"steps": 200, "methods": ["lora", "shira"]}
    assert goes_on("The run", there, there, grows=rules, way="") == []
    wrong = {"steps": 50, "methods": ["shira"], "data": {"hash": "b" * 64, "rows": 6}}
    with pytest.raises(AddendaError) as raised:
        goes_on("The run", there, wrong, grows=rules, way="Choose another.")
    told = str(raised.value)
    assert "steps was 100, now 50" in told and "data.rows was 5, now 6" in told and "bbbbbbbbbbbb…" in told
    assert "methods was ['lora'], now ['shira']" in told and told.endswith("(What may grow: steps, methods.)")
