"""Which methods are products of thin matrices: said before, and found in their tensors, is the same."""

import pytest
import torch

import addenda as ad
import toys
from addenda.core.site.site import site_at
from addenda.exporting.deltas import changed_sites, delta, factors, thin_factors
from addenda.exporting.peft.thin import exact_rank, narrow, trimmed
from shared import METHODS, NAMES, attach, relative, stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


@pytest.mark.parametrize("name", NAMES)
def test_the_rank_that_is_said_is_that_of_the_factors(name):
    model = toys.make_llama(tie_word_embeddings=False, hidden_size=16, intermediate_size=32)
    if METHODS[name].any_shape or name == "trainable-tokens":
        site = site_at(model, "model.layers.0.mlp.up_proj")
        assert exact_rank(METHODS[name], site) in (None, 1)
        return
    adapter = stir(attach(model, name, IDS, targets=["up_proj", "down_proj"]))
    for site, tensors in changed_sites(adapter):
        said = exact_rank(METHODS[name], site)
        thin = thin_factors(site, tensors)
        assert (said is None) == (thin is None) and (thin is None or thin[0].shape[-1] == said)
        if said is not None:
            B, A = factors(site, tensors)
            assert relative(B @ A, delta(site, tensors)) < 1e-6


def test_of_a_stack_the_factors_are_stacks(mixtral):
    adapter = stir(ad.attach(mixtral, ad.LoRA(rank=2), targets="*.down_proj"))
    site, tensors = next(iter(changed_sites(adapter)))
    B, A = factors(site, tensors)
    assert B.shape == (4, 8, 2) and A.shape == (4, 2, 16)
    assert relative(B @ A, delta(site, tensors)) < 1e-6


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 5, 9)])
def test_no_product_is_wider_than_its_matrix_and_none_loses_anything(shape):
    *lead, m, n = shape
    B, A = torch.randn(*lead, m, 7), torch.randn(*lead, 7, n)
    b, a = narrow(B, A)
    assert b.shape[-1] == 5 and relative(b @ a, B @ A) < 1e-6
    assert narrow(B[..., :2], A[..., :2, :])[0].shape[-1] == 2


def test_ranks_of_zeros_are_left_out_but_for_one():
    B, A = torch.randn(4, 3), torch.randn(3, 6)
    B[:, 1] = 0
    b, a = trimmed(B, A)
    assert b.shape == (4, 2) and torch.equal(b @ a, B @ A)
    assert trimmed(torch.zeros(4, 3), A)[0].shape == (4, 1)


def test_large_ranks_are_found_at_a_stand_in():
    site = site_at(torch.nn.Sequential(torch.nn.Linear(1000, 900)), "0")
    assert exact_rank(ad.LoRA(rank=300, origin="pissa"), site) == 600
    assert exact_rank(ad.LoRA(rank=500, origin="pissa"), site) == 900
    assert exact_rank(ad.SVFT(), site) is None
