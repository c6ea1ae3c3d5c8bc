"""LOHA of PEFT and loha: the same logits, both ways."""

import torch
from torch import nn

from addenda.core.site.site import site_at
from addenda.exporting.peft.loha import with_core
from addenda.exporting.peft.table import conversion_for
from addenda.methods.loha import LoHa
from peft_checks import holds, passes, refused, rows, saved, spoil


@rows("LOHA")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_a_core_between_the_factors_is_one_product_over_the_flattened_kernel():
    t, a, b = torch.randn(3, 3, 2, 2), torch.randn(3, 5), torch.randn(3, 4)
    dense = torch.einsum("ijkl,ip,jc->pckl", t.double(), a.double(), b.double())
    torch.testing.assert_close((a.T @ with_core(t, b)).double(), dense.flatten(1), rtol=1e-5, atol=1e-5)


def test_layers_that_peft_does_not_adapt_or_pads_otherwise_go_as_lora():
    assert passes("loha:rank=2", "model.layers.0.mlp.up_proj").why == "LOHA"
    assert passes("loha:rank=2", "transformer.h.0.attn.c_attn", "gpt2").why == "LORA of rank 4"
    for layer in (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv3d(2, 2, 1), nn.Embedding(5, 4)):
        _, route = conversion_for(LoHa(rank=2), site_at(nn.Sequential(layer), "0"))
        assert route.why != "LOHA"


def test_what_does_not_fit_is_refused_with_all_of_it(tmp_path):
    folder = saved(tmp_path / "a", "LOHA", r=4, target_modules=["q_proj", "k_proj"])
    end = "layers.0.self_attn.q_proj.hada_w1_b"
    refused(spoil(folder, {end: torch.zeros(3, 32)}), r"hada_w1_b is \[3, 32\], and the config .* say \[4, 32\]")
    refused(spoil(folder, {end: None}), "q_proj lacks hada_w1_b")
    folder = saved(tmp_path / "b", "LOHA", r=4, target_modules=["q_proj"])
    refused(spoil(folder, r=8), r"hada_w1_a is \[32, 4\], and the config .* say \[32, 8\]")
    refused(spoil(folder, r=4, alpha="big"), "alpha='big'")
    refused(spoil(folder, alpha=4, use_magic=True), "use_magic='True', which addenda does not read")
