"""PEFT's SHIRA: stored positions, and as many as r says."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.site.site import site_at
from addenda.exporting.peft.table import conversion_for
from peft_folders import WEIGHTS, by_peft, edited, given, take
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_positions_are_filled_up_with_zeros_to_the_number_that_r_says(tmp_path):
    adapter = stir(ad.attach(toys.make_llama(), ad.SHiRA(density=0.1), targets=["q_proj", "up_proj"]))
    stored = load_file(given(adapter, tmp_path / "out") / WEIGHTS)
    where, values = stored[f"{Q0}.shira_indices"], stored[f"{Q0}.shira_weight"]
    assert where.shape == (2, 16) and where.dtype == torch.int32 and int((values != 0).sum()) == 6
    assert len({tuple(p) for p in where.T.tolist()}) == 16
    dense = torch.zeros(8, 8).index_put((where[0].long(), where[1].long()), values)
    t = dict(adapter.sites())["model.layers.0.self_attn.q_proj"]
    assert torch.equal(dense.flatten()[t.index.long()], t.values) and int((dense != 0).sum()) == 6


def test_what_is_too_dense_for_any_r_is_no_shira():
    site = site_at(toys.make_llama(), "model.layers.0.self_attn.q_proj")
    assert conversion_for(ad.SHiRA(density=1.0), site)[1].kind == "exact"  # r = 4 of 8 × 8 names all
    tall = site_at(toys.make_llama(hidden_size=8, intermediate_size=20), "model.layers.0.mlp.up_proj")
    assert conversion_for(ad.SHiRA(density=1.0), tall)[1].kind == "approximate"


def test_one_r_for_sites_of_which_one_is_too_small(tmp_path):
    spec = {"q_proj": ad.SHiRA(density=1.0), "k_proj": ad.SHiRA(density=0.1)}
    adapter = stir(ad.attach(toys.make_llama(), spec))
    with pytest.raises(AddendaError, match=r"r=4, which the densest site wants, is more entries than .*k_proj has"):
        given(adapter, tmp_path / "out")


@pytest.mark.parametrize(("index", "words"), [(9, "positions outside of 8 × 8"), (None, "names a position twice")])
def test_positions_that_cannot_be_are_refused(index, words, tmp_path):
    by_peft(toys.make_llama, peft.ShiraConfig(r=1, target_modules=["q_proj"]), tmp_path / "peft", IDS)

    def spoil(tensors: dict) -> None:
        where = tensors[f"{Q0}.shira_indices"]
        where[:, 0] = where[:, 1] if index is None else index

    with pytest.raises(AddendaError, match=words):
        take(toys.make_llama(), edited(tmp_path / "peft", None, spoil))
