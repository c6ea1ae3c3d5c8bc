"""PEFT's VERA: read where its projections are in the folder, written with ours."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.exporting.peft.read import read
from peft_folders import WEIGHTS, by_peft, edited, given, quiet, take
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def test_without_projections_it_is_refused(tmp_path):
    with quiet():
        config = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    by_peft(toys.make_llama, config, tmp_path / "peft", IDS)
    with pytest.raises(AddendaError, match=r"no projections in its folder \(save_projection=false\)"):
        take(toys.make_llama(), tmp_path / "peft")


def test_projections_that_are_too_small_are_refused(tmp_path):
    by_peft(toys.make_llama, peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path / "peft", IDS)
    small = edited(tmp_path / "peft", None, lambda t: t.__setitem__("base_model.vera_A", torch.ones(4, 7)))
    with pytest.raises(AddendaError, match=r"is 8 × 8, and the projections \[8, 4\] and \[4, 7\]"):
        take(toys.make_llama(), small)
    other = edited(tmp_path / "peft", {"r": 3})
    with pytest.raises(AddendaError, match="the config's r is 3"):
        take(toys.make_llama(), other)


def test_what_was_read_says_that_it_is_a_lora_and_ours_holds_its_projections_once(tmp_path):
    by_peft(toys.make_llama, peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path / "peft", IDS)
    forms = read(tmp_path / "peft", toys.make_llama())
    assert "VeRA is read as a LoRA at 2 sites" in forms.notes[-1]
    adapter = stir(ad.attach(toys.make_llama(), ad.VeRA(rank=5), targets=["q_proj", "down_proj"]))
    keys = load_file(given(adapter, tmp_path / "out") / WEIGHTS)
    assert {k: tuple(t.shape) for k, t in keys.items() if "lambda" not in k} == {
        "base_model.vera_A": (5, 16), "base_model.vera_B": (8, 5),
    }  # fmt: skip


def test_two_groups_that_share_no_projections_are_refused_with_the_option_that_differs(tmp_path):
    spec = {"q_proj": ad.VeRA(rank=5), "down_proj": ad.VeRA(rank=5, d_initial=0.2)}
    adapter = stir(ad.attach(toys.make_llama(), spec))
    with pytest.raises(AddendaError, match=r"PEFT has one d_initial for a whole adapter: .*0\.1 and .*0\.2"):
        given(adapter, tmp_path / "out")
