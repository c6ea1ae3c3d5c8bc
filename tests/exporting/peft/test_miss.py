"""MISS of PEFT, and miss and bat: the same logits, both ways."""

import pytest
import torch

from addenda import AddendaError
from addenda.exporting.peft.write import write
from peft_checks import attached, holds, passes, refused, rows, saved, spoil


@rows("MISS")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_bat_by_strips_of_inputs_and_other_layers_have_no_form_in_peft():
    assert passes("bat:rank=8", "model.layers.0.mlp.up_proj").kind == "exact"
    assert "axis=out" in passes("bat:rank=8,axis=in", "model.layers.0.mlp.up_proj").why
    assert passes("bat:rank=8", "transformer.h.0.attn.c_attn", "gpt2").kind == "approximate"


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ({"*.q_proj": "miss:rank=4", "*.k_proj": "miss:rank=8"}, "one rank for a whole adapter"),
        ({"*.q_proj": "miss:rank=4,mini=4", "*.k_proj": "miss:rank=4,mini=8"}, "one mini for a whole adapter"),
        ({"*.q_proj": "miss:rank=4", "*.k_proj": "bat:rank=4"}, "one form of MISS for a whole adapter"),
    ],
)
def test_what_peft_has_once_for_an_adapter_must_be_one(tmp_path, methods, match):
    with pytest.raises(AddendaError, match=match):
        write(attached(methods), tmp_path)
    assert not list(tmp_path.iterdir())


def test_shapes_are_those_of_the_form(tmp_path):
    folder = saved(tmp_path / "a", "MISS", r=8, target_modules=["q_proj"])
    refused(spoil(folder, init_weights="bat"), r"miss_block is \[8, 32\], and the config .* say \[4, 8, 8\]")
    refused(spoil(folder, init_weights="mini", mini_r=4), r"miss_block is \[8, 32\], and the config .* say \[8, 4\]")
    refused(spoil(folder, init_weights="bat", r=5), "rank 5 does not divide")
    refused(spoil(folder, init_weights=True, r=64), "rank 64 is above the input width 32")
    folder = saved(tmp_path / "b", "MISS", r=8, target_modules=["q_proj"])
    refused(spoil(folder, {"layers.0.self_attn.q_proj.miss_block": torch.zeros(8, 8)}), r"miss_block is \[8, 8\]")
