"""Changes carried over without training, against dense algebra in float64."""

import pytest
import torch
from transformers import LlamaForCausalLM

import addenda as ad
from addenda.data.read import read
from addenda.exporting.deltas import changed_sites, delta
from addenda.transferring.controls import copied, projected
from addenda.transferring.distil import distil
from shared import stir
from tiny_models import config, make_llama, make_tokenizer

EXACT = {"atol": 1e-6, "rtol": 1e-5}


def deep(layers=4, **sizes):
    """A target whose first two layers are those of make_llama, where the sizes are its own too."""
    torch.manual_seed(5)
    made = LlamaForCausalLM(config(num_hidden_layers=layers, **sizes)).eval()
    if not sizes:
        own = make_llama().state_dict()
        made.load_state_dict(made.state_dict() | own)
    return made


def source(method="lora:rank=3", **options):
    model = make_llama()
    return stir(ad.attach(model, method, name="a", **options), 0.2, 1)


def deltas(adapter):
    return {site.path: delta(site, tensors) for site, tensors in changed_sites(adapter)}


@pytest.mark.parametrize(
    "method", ["lora:rank=3", "lora:rank=3,alpha=12", "dora:rank=2", "shira:density=0.05", "pissa:rank=2"]
)
def test_layers_of_the_same_number_get_the_same_change(method):
    adapter, target = source(method), deep()
    wanted = deltas(adapter)
    made = copied(adapter, target, name="moved")
    found = deltas(made.adapter)
    assert found.keys() == wanted.keys() and not made.left and not made.fresh
    for path, D in wanted.items():
        torch.testing.assert_close(found[path], D, atol=1e-5, rtol=1e-4)
    assert all(s.kept == pytest.approx(1, abs=1e-4) and s.path == s.source for s in made.sites)
    assert "moved: active" in ad.status(target) and any(p.requires_grad for p in made.adapter.parameters())


def test_on_the_same_base_a_copy_answers_as_the_source_does():
    adapter, target = source(), make_llama()
    copied(adapter, target)
    ids = torch.arange(10)[None] + 4
    torch.testing.assert_close(target(ids).logits, adapter.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_rank_cuts_the_change_or_leaves_room_that_begins_at_nothing():
    adapter = source()
    wanted = deltas(adapter)
    wide = copied(adapter, deep(), rank=5, fill=True)
    found = deltas(wide.adapter)
    assert len(wide.fresh) == len(wide.sites) == 14 and {s.rank for s in wide.sites} == {5}
    for path, D in found.items():
        torch.testing.assert_close(D, wanted[path] if path in wanted else torch.zeros_like(D), **EXACT)
    A = dict(wide.adapter.named_parameters())["model.layers.0.self_attn.q_proj/A"]
    assert A.shape == (5, 32) and bool((A.norm(dim=1) > 0).all())
    cut = copied(adapter, deep(), rank=1)
    for site in cut.sites:
        U, S, Vt = torch.linalg.svd(wanted[site.path])
        torch.testing.assert_close(deltas(cut.adapter)[site.path], S[0] * U[:, :1] @ Vt[:1], **EXACT)
        assert site.error == pytest.approx(float((S[1:] ** 2).sum().sqrt() / S.norm()), abs=1e-6)


def test_relative_layers_are_at_the_same_share_of_the_depth():
    adapter, target = source(targets="*q_proj"), deep(6)
    made = copied(adapter, target, layers="relative")
    origins = [int(s.source.split(".")[2]) for s in made.sites]
    assert origins == [0, 0, 0, 1, 1, 1] and not made.left


def projection(Ws, Wt, D, k):
    """The formula, dense, with singular vectors of torch's own and no fixed signs."""
    (Us, _, Vs), (Ut, _, Vt) = (torch.linalg.svd(W.detach().double(), full_matrices=False) for W in (Ws, Wt))
    Us, Vs, Ut, Vt = Us[:, :k], Vs[:k], Ut[:, :k], Vt[:k]
    return Ut @ Ut.T @ Us @ Us.T @ D @ Vs.T @ Vs @ Vt.T @ Vt


@pytest.mark.parametrize(("k", "method"), [(4, "lora:rank=3"), (None, "lora:rank=3"), (4, "dora:rank=2")])
def test_at_equal_shapes_it_is_the_projection_onto_both_subspaces(k, method):
    adapter, target = source(method), make_llama(seed=1)
    weights = {path: target.get_submodule(path).weight.clone() for path in deltas(adapter)}
    made = projected(adapter, target, directions=k)
    found = deltas(made.adapter)
    for path, D in deltas(adapter).items():
        Ws = adapter.model.get_submodule(path).weight
        torch.testing.assert_close(found[path], projection(Ws, weights[path], D, k or min(Ws.shape)), **EXACT)
    assert all(0 < s.kept <= 1 + 1e-6 for s in made.sites)


def test_on_the_same_base_the_leading_part_stays_and_all_of_a_square_one():
    adapter = source(targets=["*q_proj", "*o_proj"])
    made = projected(adapter, make_llama())
    for path, D in deltas(made.adapter).items():
        torch.testing.assert_close(D, deltas(adapter)[path], **EXACT)


def test_at_other_shapes_the_directions_stand_for_each_other_in_order():
    adapter, target = source(targets="*q_proj"), deep(2, hidden_size=48, intermediate_size=80)
    made = projected(adapter, target, directions=6)
    for path, D in deltas(adapter).items():
        bases = []
        for model in (adapter.model, target):
            U, _, Vt = torch.linalg.svd(model.get_submodule(path).weight.detach().double())
            sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))[0, :6]
            bases.append((U[:, :6] * sign, Vt[:6] * sign[:, None]))
        (Us, Vs), (Ut, Vt) = bases
        torch.testing.assert_close(deltas(made.adapter)[path], Ut @ (Us.T @ D @ Vs.T) @ Vt, **EXACT)
    assert len(made.sites) == 2
    with pytest.raises(ad.AddendaError, match=r"Nothing of 'a' fits.*is \[48, 48\] and not \[32, 32\]"):
        copied(adapter, deep(2, hidden_size=48, intermediate_size=80))


def test_what_cannot_be_moved_is_refused_and_the_target_stays_as_it_was():
    target = deep()
    with pytest.raises(ad.AddendaError, match="changes activations"):
        copied(source("pfeiffer:rank=2"), target)
    with pytest.raises(ad.AddendaError, match="give rank="):
        copied(source(), target, fill=True)
    with pytest.raises(ad.AddendaError, match="layers must be"):
        copied(source(), target, layers="all")  # type: ignore[arg-type]
    with pytest.raises(ad.AddendaError, match="directions must be"):
        projected(source(), target, directions=0)
    with pytest.raises(ad.AddendaError, match="no such place"):
        copied(source(), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert ad.status(target) == "LlamaForCausalLM: no adapter attached"


def test_the_file_of_a_control_is_a_start_of_distilling(tmp_path):
    tokenizer, target = make_tokenizer(), deep()
    copied(source(), target, rank=3, fill=True).adapter.save(tmp_path / "start.safetensors")
    ad.detach(target)
    data = read([{"question": f"{a}+1=?", "answer": str(a + 1)} for a in range(8)])
    made = distil(target, tokenizer, data, start=tmp_path / "start.safetensors", steps=2, batch=4)
    assert made.steps == 2 and len(list(made.adapter.sites())) == 28
