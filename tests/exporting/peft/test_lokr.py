"""LOKR of PEFT, and lokr and krona: the same logits, both ways."""

import pytest
import torch
from bench.peft_parity import base_of
from bench.peft_rows import Row

from addenda import AddendaError
from addenda.exporting.peft.lokr import split
from addenda.exporting.peft.read import read
from addenda.exporting.peft.write import write
from addenda.methods.lokr import LoKr
from addenda.methods.lora import LoRA
from peft_checks import attached, holds, passes, refused, rows, saved, spoil


@rows("LOKR")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_widths_are_split_as_peft_splits_them():
    from peft.tuners.lokr.layer import factorization

    for width in (*range(1, 65), 96, 127, 128, 360):
        for factor in (-1, 1, 2, 3, 4, 5, 6, 8, 12, 16, 64):
            assert split(width, factor) == factorization(width, factor), (width, factor)


def test_a_split_that_no_factor_here_gives_is_read_as_the_same_matrix_in_lora(tmp_path):
    """32 = 8 · 4 under decompose_factor=8: above the root of 32, where addenda's lokr never is."""
    folder = saved(tmp_path / "a", "LOKR", r=1, alpha=1, decompose_factor=8, target_modules=["q_proj"])
    forms = read(folder, base_of(Row("")))
    (first, _), tensors = forms.sites["model.layers.0.self_attn.q_proj"], forms.sites
    assert len(tensors) == 2 and first == LoRA(rank=8, alpha=8.0)
    assert "became LoRA" in forms.notes[0]
    whole = saved(tmp_path / "b", "LOKR", r=64, alpha=1, decompose_factor=8, target_modules=["q_proj"])
    refused(whole, "8 × 8 as the first factor has no form here of low rank")


def test_a_whole_second_factor_over_a_conv1d_is_no_kronecker_product_in_peft(tmp_path):
    folder = saved(tmp_path / "a", "LOKR", "convolutions", r=8, target_modules=["line"])
    refused(folder, "line: PEFT's own product of a whole w2 over a Conv1d", "convolutions")
    assert "Conv1d" in passes("krona:factor=4", "line", "convolutions").why
    assert passes("krona:factor=4", "wide", "convolutions").kind == "exact"


def test_a_split_through_the_kernel_of_a_convolution_has_no_form_in_peft():
    """Of 8 inputs and 9 taps: 72 = 6 · 12 cuts no input, 8 · 9 does, but then 16 is not 4 · 4; 4 · 18 does both."""
    kinds = {f: passes(f"krona:factor={f}", "wide", "convolutions").kind for f in (4, 6, 8)}
    assert kinds == {4: "exact", 6: "approximate", 8: "approximate"}


def test_one_factor_must_split_every_site(tmp_path):
    adapter = attached({"*.q_proj": "lokr:rank=1,factor=2", "*.up_proj": "lokr:rank=1"})
    with pytest.raises(AddendaError, match="one decompose_factor for a whole adapter, and none splits"):
        write(adapter, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_refused(tmp_path):
    folder = saved(tmp_path / "a", "LOKR", r=2, target_modules=["q_proj"])
    refused(spoil(folder, decompose_factor=0), "decompose_factor=0")
    refused(spoil(folder, decompose_factor=2), r"lokr_w1 is \[4, 4\]")
    refused(spoil(folder, decompose_factor=-1, alpha=0), "alpha must be above 0")
    refused(spoil(folder, {"layers.0.self_attn.q_proj.lokr_w2_b": torch.zeros(2, 9)}, alpha=1), "lokr_w2_b is")


def test_options_are_those_of_the_folder(tmp_path):
    folder = saved(tmp_path / "a", "LOKR", r=2, alpha=6, target_modules=["q_proj", "up_proj"], decompose_factor=4)
    forms = read(folder, base_of(Row("")))
    methods = {path.rpartition(".")[2]: m for path, (m, _) in forms.sites.items()}
    assert methods == {"q_proj": LoKr(2, 6.0, 4), "up_proj": LoKr(2, 6.0, 4)}
