"""Every change as a product of two thin matrices."""

import pytest
import torch

import addenda as ad
from addenda import AddendaError
from addenda.core.site.site import site_at
from addenda.exporting.deltas import changed_sites, delta, thin_factors
from addenda.exporting.pairs import Pair, balanced, is_low_rank, low_rank
from shared import HIDDEN, METHODS, NAMES, attach, effective, relative, stir, where
from toys import make_gpt2, make_llama, make_mixtral

IDS = torch.arange(10)[None]


@pytest.mark.parametrize("name", NAMES)
def test_deltas_and_factors_are_what_the_layer_adds(name):
    model = make_llama(tie_word_embeddings=False, attention_bias=True).eval()
    adapter = stir(attach(model, name, IDS, targets=where(name) if METHODS[name].targets == "linear" else None))
    adapter.model.eval()
    moved = 0.0
    for site, tensors in changed_sites(adapter):
        change = effective(site, torch.float64).double() - site.weight.detach().double()
        found = site.kind.from_matrix(delta(site, tensors), site.weight)
        assert relative(found, change) < 1e-5
        moved += float(change.norm())
        thin = thin_factors(site, tensors)
        assert thin is None or relative(thin[0] @ thin[1], delta(site, tensors)) < 1e-6
    assert moved > 0


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS[n].targets == "linear"])
def test_a_rank_leaves_the_tail_energy_and_full_rank_leaves_nothing(name):
    model = make_gpt2()
    method = METHODS[name]
    try:
        adapter = stir(attach(model, method, IDS, targets="attn.c_proj"))
    except AddendaError:  # no such shape
        pytest.skip("the method does not fit an 8 × 8 layer of GPT-2")
    model.eval()
    cut, full = low_rank(adapter, rank=2), low_rank(adapter, rank=8)
    for site, tensors in changed_sites(adapter):
        D = delta(site, tensors)
        S = torch.linalg.svdvals(D)
        natural = thin_factors(site, tensors)
        tail = 0.0 if natural is not None and natural[1].shape[0] <= 2 else float(S[2:].norm() / S.norm())
        assert cut[site.path].rank <= 2 and abs(cut[site.path].error - tail) < 1e-5
        assert abs(relative(cut[site.path].B @ cut[site.path].A, D) - tail) < 1e-5
        assert relative(full[site.path].B @ full[site.path].A, D) < 1e-5 and full[site.path].exact


def test_who_is_no_low_rank_change_is_told_which_rank_would_keep_what():
    model = make_llama()
    adapter = stir(ad.attach(model, METHODS["oft"]))
    site, tensors = next(changed_sites(adapter))
    S = torch.linalg.svdvals(delta(site, tensors)).square()
    kept = [int((S.cumsum(0) / S.sum() < share).sum()) + 1 for share in (0.9, 0.99)]
    with pytest.raises(AddendaError, match=f"rank {kept[0]} keeps 90 %.*rank {kept[1]} keeps 99 %.*merged") as error:
        low_rank(adapter)
    assert "rank= or energy=" in str(error.value)
    pairs = low_rank(adapter, energy=0.9)
    assert pairs[site.path].rank == kept[0] and pairs[site.path].error <= 0.1**0.5


def test_stacks_have_a_pair_for_each_matrix():
    model = make_mixtral()
    adapter = stir(ad.attach(model, METHODS["rslora"], targets="model.layers.*.mlp.experts.*"))
    for path, pair in low_rank(adapter).items():
        site = site_at(model, path)
        assert pair.B.dim() == 3 and len(pair.B) == site.copies == 4
        change = effective(site, torch.float64).double() - site.weight.detach().double()
        assert relative(pair.B @ pair.A, change) < 1e-5


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"rank": 2, "energy": 0.5}])
def test_wrong_numbers_are_refused(wrong):
    adapter = ad.attach(make_llama(), METHODS["lora"])
    with pytest.raises(AddendaError, match=r"rank|energy"):
        low_rank(adapter, **wrong)


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_methods_are_refused_by_name(name):
    adapter = attach(make_llama(), name, IDS)
    with pytest.raises(AddendaError, match=f"{name}.*activations"):
        low_rank(adapter)


def test_changes_of_vectors_are_refused():
    adapter = stir(ad.attach(make_llama(), "ln-tuning"))
    with pytest.raises(AddendaError, match="is a vector"):
        low_rank(adapter, rank=1)


def test_low_rank_by_form_is_found_on_a_small_layer():
    found = {name for name in NAMES if is_low_rank(ad.core.method.catalogue.info(name).build())}
    assert {"lora", "rslora", "pissa", "olora", "dylora", "adalora", "vera", "loldu", "nola", "miss"} <= found
    assert not found & {"dora", "oft", "boft", "svft", "shira", "full", "bitfit", "fourierft", "c3a", "lokr"}


def test_whether_a_method_is_low_rank_takes_no_numbers_of_torchs_own():
    state = torch.get_rng_state()
    assert is_low_rank.__wrapped__(METHODS["lora"]) and not is_low_rank.__wrapped__(METHODS["oft"])
    assert torch.equal(torch.get_rng_state(), state)


def test_balanced_factors_are_the_same_product_and_alike_in_size():
    site = site_at(torch.nn.Sequential(torch.nn.Linear(6, 6)), "0")
    B, A = torch.randn(6, 2) * 1e-9, torch.randn(2, 6) * 1e7
    made = balanced(Pair(site, B, A))
    assert torch.equal(made.B.double() @ made.A.double(), B.double() @ A.double())
    assert 0.5 <= float(made.B.abs().max() / made.A.abs().max()) <= 2
    for odd in (torch.zeros(6, 2), torch.full((6, 2), torch.nan), torch.full((6, 2), torch.inf), torch.zeros(6, 0)):
        assert balanced(Pair(site, odd, A)).B is odd  # nothing to balance
