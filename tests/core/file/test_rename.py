"""Maps of paths: what each entry reaches, and what no map can be."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.file.rename import new_paths, renamed
from shared import attach, stir

PATHS = ["model.layers.0.attn.q", "model.layers.1.attn.q", "model.layers.0.mlp@model.layers.0.norm", "score.weight"]


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        (
            {"model.layers.*.attn.q": "model.layers.*.self_attn.q_proj"},
            ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", *PATHS[2:]],
        ),
        ({"model": "lm", "score": "head"}, [p.replace("model", "lm").replace("score", "head") for p in PATHS]),
        ({"*": "base.*"}, ["base." + p.replace("@", "@base.") for p in PATHS]),
        ({"model.*": "*"}, [p.replace("model.", "") for p in PATHS]),
        (
            {"model.layers.*": "blocks.*", "model.layers.0.mlp": "first"},
            ["blocks.0.attn.q", "blocks.1.attn.q", "first@blocks.0.norm", "score.weight"],
        ),
        ({"model.layers.*.*.q": "model.layers.*.*.k"}, [p.replace(".q", ".k") for p in PATHS]),
        ({PATHS[2]: "there@input"}, [*PATHS[:2], "there@input", PATHS[3]]),
        (dict(zip(PATHS[:2], PATHS[1::-1], strict=True)), [PATHS[1], PATHS[0], *PATHS[2:]]),
    ],
    ids=str,
)
def test_what_an_entry_reaches(rename, expected):
    assert list(new_paths(PATHS, rename, "a.safetensors").values()) == expected


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"model.layer": "x"}, "'model.layer': no path matches.*Did you mean"),
        ({"model.layers.0": "model.layers.1"}, r"0\.attn\.q and model\.layers\.1\.attn\.q both become"),
        ({"model.*.attn.q": "q"}, r"each \* of a path fills one \*"),
        ({"score": "x", "score.weight": "y"}, "'score': a longer entry comes before it"),
        ({"": "x"}, "text that is not empty"),
        ({"score": 3}, "text that is not empty"),
        ([("a", "b")], "is a dict .* got list"),
    ],
    ids=str,
)
def test_what_no_map_can_be(rename, message):
    with pytest.raises(AddendaError, match=message):
        new_paths(PATHS, rename, "a.safetensors")


WORD = st.sampled_from(["a", "b", "0", "1", "q_proj"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(WORD, min_size=1, max_size=4).map(".".join), min_size=1, unique=True), st.data())
def test_a_map_of_whole_paths_is_undone_by_its_inverse(paths, data):
    there = {p: f"new.{i}" for i, p in enumerate(data.draw(st.permutations(paths)))}
    new = new_paths(paths, there, "a.safetensors")
    assert new == there
    assert new_paths(new.values(), {v: k for k, v in there.items()}, "b.safetensors") == {v: k for k, v in new.items()}


def test_a_hostile_path_costs_nothing():
    long = "a." * 200_000
    assert new_paths([long, "a.b.c"], {"*.*.c": "*.*.d"}, "x") == {long: long, "a.b.c": "a.b.d"}


def test_a_file_comes_back_whole_with_codes_heads_and_pools(tiny, tmp_path):
    for method in (ad.LoRA(rank=2, bits=3), "vb-lora"):
        adapter = stir(attach(tiny, method, targets="q_proj", also_train=["score"], name=str(tiny.training)))
        header, tensors = read(adapter.save(tmp_path / "a.safetensors"))
        ad.detach(tiny)
        other, moved = renamed(header, tensors, {"*": "base.*"}, "a")
        assert {s.path for s in other.sites} == {f"base.{s.path}" for s in header.sites}
        assert {s.origin for s in other.sites} == {s.path for s in header.sites}
        assert len(moved) == len(tensors)
        assert {k for k in moved if k[0] == "."} == {k for k in tensors if k[0] == "."}
        back, same = renamed(other, moved, {"base.*": "*"}, "a")
        assert back == header
        assert same.keys() == tensors.keys()
        assert json.dumps(back.to_json()) == json.dumps(header.to_json())
        assert dataclasses.replace(other, sites=header.sites) == header
