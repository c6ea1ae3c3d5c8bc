"""DoRA both ways: what PEFT scales otherwise is refused, and a plain LoRA is a DoRA whose lengths are its own."""

import peft
import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.site.site import site_at
from addenda.exporting.peft import dora
from addenda.exporting.peft.table import conversion_for
from peft_folders import by_peft, given, take
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def make_untied() -> nn.Module:
    return toys.make_llama(tie_word_embeddings=False)


def test_embeddings_are_refused_both_ways(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    by_peft(make_untied, config, tmp_path / "peft", IDS)
    with pytest.raises(AddendaError, match="scales its columns, addenda's its rows"):
        take(make_untied(), tmp_path / "peft")
    site = site_at(make_untied(), "model.embed_tokens")
    assert conversion_for(ad.DoRA(rank=2), site)[1].kind == "approximate"
    mixed = {"q_proj": ad.DoRA(rank=2), "model.embed_tokens": ad.LoRA(rank=2)}
    adapter = stir(ad.attach(make_untied(), mixed))
    with pytest.raises(AddendaError, match=r"one use_dora for all sites: model\.embed_tokens"):
        given(adapter, tmp_path / "out")


def test_grouped_convolutions_and_raw_parameters_are_no_dora(mixtral):
    grouped = site_at(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), "0")
    assert "grouped" in (dora.obstacle(grouped) or "")
    assert "raw parameters" in (dora.obstacle(site_at(mixtral, "model.layers.0.mlp.experts.down_proj")) or "")


def test_lengths_of_a_plain_change_leave_it_as_it_is():
    site = site_at(nn.Sequential(nn.Conv2d(3, 4, 3)), "0")
    change = torch.randn(4, 27, dtype=torch.float64)
    lengths = dora.lengths(site, change)
    assert lengths.shape == (1, 4, 1, 1)
    assert torch.allclose(lengths.flatten().double(), (site.matrix.double() + change).norm(dim=1), rtol=1e-6)
