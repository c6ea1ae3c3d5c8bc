"""HRA of PEFT and hra: the same logits, both ways."""

import pytest
import torch

from addenda import AddendaError
from addenda.exporting.peft.write import write
from peft_checks import attached, holds, passes, refused, rows, saved, spoil


@rows("HRA")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_gram_schmidt_and_odd_ranks_are_refused_with_the_way_out(tmp_path):
    folder = saved(tmp_path / "a", "HRA", r=4, target_modules=["q_proj"])
    refused(spoil(folder, apply_GS=True), "apply_GS: it makes its vectors orthogonal .* addenda extract")
    refused(spoil(folder, apply_GS=False, r=3), "r=3: addenda's hra has reflections in pairs.* addenda extract")
    refused(spoil(folder, r=6), r"hra_u is \[32, 4\], and the config .* say \[32, 6\]")


def test_one_rank_for_an_adapter_and_no_layer_that_peft_computes_otherwise(tmp_path):
    with pytest.raises(AddendaError, match="one rank for a whole adapter"):
        write(attached({"*.q_proj": "hra:rank=2", "*.k_proj": "hra:rank=4"}), tmp_path)
    assert not list(tmp_path.iterdir())
    assert passes("hra:rank=4", "wide", "convolutions").kind == "exact"
    assert passes("hra:rank=4", "grouped", "convolutions").kind == "approximate"
    assert passes("hra:rank=4", "transformer.h.0.attn.c_attn", "gpt2").kind == "approximate"
    assert torch.is_grad_enabled()
