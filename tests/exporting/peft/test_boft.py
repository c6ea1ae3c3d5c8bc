"""BOFT of PEFT and boft: the same logits, both ways."""

import pytest
import torch
from bench.peft_parity import base_of, peft_reads
from bench.peft_rows import Row

from addenda import AddendaError
from addenda.exporting.peft.read import read
from addenda.exporting.peft.write import write
from addenda.methods.boft import BOFT
from peft_checks import attached, holds, kernel_of_boft, passes, refused, rows, saved, spoil


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """As where PEFT's CUDA kernel does not compile, without trying."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@rows("BOFT")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


@pytest.mark.parametrize("levels", [2, 3])
def test_several_levels_are_those_of_a_peft_whose_kernel_compiles(levels, tmp_path, monkeypatch):
    kernel_of_boft(monkeypatch)
    config = {
        "peft_type": "BOFT",
        "boft_block_size": 4,
        "boft_n_butterfly_factor": levels,
        "target_modules": ["q_proj"],
    }
    ours = {"*.q_proj": f"boft:block=4,levels={levels},scale=true"}
    holds(Row("", config, ours), tmp_path)


def test_a_peft_without_its_kernel_does_not_load_several_levels(tmp_path):
    assert "CUDA kernel" in passes("boft:block=4,levels=2", "model.layers.0.mlp.up_proj").why
    write(attached({"*.q_proj": "boft:block=4,levels=2"}), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_reads(Row(""), tmp_path)


def test_levels_are_those_of_the_tensor(tmp_path):
    folder = saved(tmp_path / "a", "BOFT", boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj"])
    forms = read(folder, base_of(Row("")))
    assert {m for m, _ in forms.sites.values()} == {BOFT(block=4, levels=1, scale=True)}


def test_what_does_not_fit_is_refused(tmp_path):
    folder = saved(tmp_path / "a", "BOFT", boft_block_size=4, target_modules=["q_proj"])
    end = "layers.0.self_attn.q_proj.boft_R"
    refused(spoil(folder, {end: torch.zeros(1, 8, 4, 3)}), r"boft_R is \[1, 8, 4, 3\]|odd side")
    refused(spoil(folder, {end: torch.zeros(5, 8, 4, 4)}), "does not divide the input width 32")
    refused(spoil(folder, {end: torch.zeros(32)}), "boft_R is")
    odd = saved(tmp_path / "b", "BOFT", boft_block_size=3, target_modules=["down_proj"])
    refused(odd, "blocks of an odd side, 3")
    grouped = {"*.q_proj": "boft:block=4,levels=1", "*.up_proj": "boft:block=4,levels=2"}
    with pytest.raises(AddendaError, match="one levels for a whole adapter"):
        write(attached(grouped), tmp_path)
    assert passes("boft:block=4,levels=1", "grouped", "convolutions").kind == "approximate"
