"""VBLORA of PEFT and vb-lora: the same logits, both ways."""

import pytest
import torch
from safetensors.torch import load_file

from addenda import AddendaError
from addenda.exporting.peft.write import write
from peft_checks import WEIGHTS, attached, holds, passes, refused, rows, saved, spoil

SIZES = {"r": 4, "num_vectors": 16, "vector_length": 16}


@rows("VBLORA")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_the_bank_stands_once(tmp_path):
    write(attached({"*.q_proj": "vb-lora:rank=4,vectors=16,length=16"}), tmp_path)
    keys = load_file(tmp_path / WEIGHTS)
    assert [k for k in keys if "bank" in k] == ["base_model.vblora_vector_bank"]


def test_the_form_of_chosen_vectors_is_refused_with_the_way_out(tmp_path):
    folder = saved(tmp_path / "a", "VBLORA", **SIZES, save_only_topk_weights=True, target_modules=["q_proj"])
    refused(folder, "save_only_topk_weights: .* no logits.*addenda extract")


def test_what_does_not_fit_is_refused(tmp_path):
    folder = saved(tmp_path / "a", "VBLORA", **SIZES, target_modules=["q_proj"])
    refused(spoil(folder, num_vectors=8), r"vblora_vector_bank is \[16, 16\], and the config says \[8, 16\]")
    refused(spoil(folder, num_vectors=16, vector_length=7), "widths that vector_length divides")
    refused(spoil(folder, vector_length=16, topk=17), "topk=17 is more than there are vectors")
    refused(spoil(folder, {"vblora_vector_bank": None}, topk=2), "lacks base_model.vblora_vector_bank")
    folder = saved(tmp_path / "b", "VBLORA", **SIZES, target_modules=["q_proj"])
    bad = {"layers.0.self_attn.q_proj.vblora_logits_A": torch.zeros(4, 2, 15)}
    refused(spoil(folder, bad), r"vblora_logits_A is \[4, 2, 15\]")


def test_two_banks_and_cut_pieces_have_no_form_in_peft(tmp_path):
    adapter = attached(
        {"*.q_proj": "vb-lora:rank=4,vectors=16,length=16", "*.k_proj": "vb-lora:rank=2,vectors=16,length=16"}
    )
    with pytest.raises(AddendaError, match="one rank for a whole adapter"):
        write(adapter, tmp_path)
    assert not list(tmp_path.iterdir())
    assert passes("vb-lora:length=16", "model.layers.0.mlp.up_proj").why == "VBLORA"
    assert passes("vb-lora:length=20", "model.layers.0.mlp.up_proj").why != "VBLORA"
