"""OFT of PEFT and oft: the same logits, both ways."""

import math

import pytest
import torch
from bench.peft_parity import base_of
from bench.peft_rows import Row
from torch import nn

from addenda import AddendaError
from addenda.core.site.site import site_at
from addenda.exporting.peft.oft import _projected
from addenda.exporting.peft.read import read
from addenda.exporting.peft.table import conversion_for
from addenda.exporting.peft.write import write
from addenda.methods.oft import OFT
from peft_checks import attached, holds, passes, refused, rows, saved, spoil


@rows("OFT")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_the_numbers_turn_their_sign_where_peft_has_a_series(tmp_path):
    for name, series, sign in (("a", True, -1), ("b", False, 1)):
        folder = saved(tmp_path / name, "OFT", oft_block_size=8, use_cayley_neumann=series, target_modules=["q_proj"])
        from safetensors.torch import load_file

        forms = read(folder, base_of(Row("")))
        method, own = forms.sites["model.layers.0.self_attn.q_proj"]
        stored = load_file(folder / "adapter_model.safetensors")
        (vec,) = (t for k, t in stored.items() if "layers.0" in k)
        assert method == OFT(block=8, terms=5 if series else 0)
        assert torch.equal(own["skew"], sign * vec)


def test_coft_is_read_as_peft_projects_it():
    from peft.tuners.oft.layer import OFTRotationModule

    module = OFTRotationModule(4, 28, 8, 32, coft=True)
    vec = torch.randn(4, 28) * torch.tensor([1.0, 1e-3, 0.2, 0.05])[:, None]
    torch.testing.assert_close(_projected(vec, 0.5), module._project_batch(vec, eps=0.5))
    lengths = _projected(vec, 0.5).double().square().sum(1).mul(2).sqrt()
    assert float(lengths.max()) <= 0.5 / math.sqrt(4) * (1 + 1e-6)
    assert torch.equal(_projected(vec, 100.0), vec)


def test_series_that_are_no_rotation_are_refused(tmp_path):
    folder = saved(tmp_path / "a", "OFT", oft_block_size=8, target_modules=["q_proj"])
    for terms in (1, 2):
        refused(spoil(folder, num_cayley_neumann_terms=terms), f"{terms} terms of the series")
    refused(spoil(folder, num_cayley_neumann_terms=101), "terms must be at most 100")


def test_a_folder_of_an_old_peft_says_too_little(tmp_path):
    folder = saved(tmp_path / "a", "OFT", oft_block_size=8, target_modules=["q_proj"])
    refused(spoil(folder, peft_version="0.17.1"), "before 0.18, whose series was another")
    refused(spoil(folder, peft_version=None), "before 0.18")
    refused(spoil(folder, use_cayley_neumann=None), "does not say use_cayley_neumann")
    read(spoil(folder, use_cayley_neumann=False), base_of(Row("")))


def test_convolutions_of_more_than_one_tap_and_of_groups_have_no_form(tmp_path):
    folder = saved(tmp_path / "a", "OFT", "convolutions", oft_block_size=4, target_modules=["wide"])
    refused(folder, "PEFT turns the patches .* and adds them up again", "convolutions")
    for layer, kind in (
        (nn.Conv2d(8, 8, 1), "exact"),
        (nn.Conv2d(8, 8, 1, groups=2), "approximate"),
        (nn.Conv2d(8, 8, 3), "approximate"),
        (nn.Conv1d(8, 8, 1), "approximate"),
        (nn.Embedding(8, 8), "exact"),
    ):
        assert conversion_for(OFT(block=4), site_at(nn.Sequential(layer), "0"))[1].kind == kind


def test_three_terms_have_no_form_in_peft():
    assert "4 terms or more" in passes("oft:block=8,terms=3", "model.layers.0.mlp.up_proj").why


def test_one_size_of_blocks_or_one_number_of_them(tmp_path):
    adapter = attached({"*.q_proj": "oft:block=8", "*.up_proj": "oft:block=16"})
    with pytest.raises(AddendaError, match="one block for a whole adapter"):
        write(adapter, tmp_path)
    with pytest.raises(AddendaError, match="one terms for a whole adapter"):
        write(attached({"*.q_proj": "oft:block=8", "*.up_proj": "oft:block=8,terms=5"}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_of_other_shapes_are_refused(tmp_path):
    folder = saved(tmp_path / "a", "OFT", oft_block_size=8, target_modules=["q_proj"])
    end = "layers.0.self_attn.q_proj.oft_R.weight"
    refused(spoil(folder, {end: torch.zeros(4, 27)}), r"oft_R.weight is \[4, 27\], and blocks × b")
    refused(spoil(folder, {end: torch.zeros(4, 10)}), "blocks of 5 do not divide the width 32")
    refused(spoil(folder, {end: torch.zeros(28)}), r"oft_R.weight is \[28\]")
    refused(spoil(folder, {end: torch.zeros(4, 28)}, block_share=True), r"is \[4, 28\], and .* say \[1, 28\]")


@pytest.mark.parametrize("shape", [(), (28,), (2, 2, 28)])
def test_numbers_that_are_no_matrix_are_refused(tmp_path, shape):
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path, "OFT", oft_block_size=8, use_cayley_neumann=True, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, next(iter(tensors)): torch.ones(shape)}, file)
    with pytest.raises(AddendaError, match="is wanted"):
        read(folder, base_of(Row("")))
