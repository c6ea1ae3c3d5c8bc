"""An adapter file against a skeleton: its tensors at a site are those that a load attaches."""

import pytest
import torch
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.forward.adapted import effective_weight
from addenda.core.forward.slots import slots_of
from addenda.core.site.site import site_at
from addenda.exporting.stored import StoredAdapter, one_of
from addenda.models.skeleton import filled, names_of, skeleton
from architectures import make
from shared import stir


def stored(model, file) -> StoredAdapter:
    model.config.architectures = [type(model).__name__]
    return StoredAdapter.of(file, *read(file), skeleton(model.config))


@pytest.mark.parametrize(
    "method", ["svft:pattern=banded,band=2", "vera:rank=4", "vb-lora:vectors=8,length=4", "dora:rank=2"]
)
def test_tensors_are_those_of_a_loaded_adapter(method, tmp_path):
    """Derived ones, those that all sites share, and those that all sites train together."""
    model = make("LlamaForCausalLM")
    adapter = stir(ad.attach(model, method), 0.1)
    adapter.save(tmp_path / "a.safetensors")
    held = stored(make("LlamaForCausalLM"), tmp_path / "a.safetensors")
    names, live = names_of(held.model), dict(adapter.sites())
    for site, m in held.plan:
        W = model.get_parameter(site.tensor_path).detach()
        assert held.mismatch(site, W, names, "exact") is None
        assert held.mismatch(site, W + 1e-3, names, "exact") == site.path
        with filled(held.model, {site.tensor_path: W}, names):
            built = held.at(site, m)
        expected = live[site.path].eval().tensors()
        assert built.tensors().keys() == expected.keys()
        assert all(torch.equal(t, expected[k]) for k, t in built.tensors().items())


def test_one_matrix_of_a_stack_at_a_time(tmp_path):
    model = make("MixtralForCausalLM")
    adapter = stir(ad.attach(model, "dora:rank=2", targets="*.experts.*_proj"), 0.1)
    adapter.save(tmp_path / "a.safetensors")
    held = stored(make("MixtralForCausalLM"), tmp_path / "a.safetensors")
    names, checked = names_of(held.model), 0
    for site, m in held.plan:
        there = site_at(model, site.path)
        W = there.weight.detach()
        whole = effective_weight(there, slots_of(there.module).live[there.parameter])
        with filled(held.model, {site.tensor_path: W}, names):
            built = held.at(site, m)
        for e in range(len(W)):
            with filled(held.model, {site.tensor_path: W[e : e + 1]}, names):
                part = effective_weight(site, (one_of(built, e),))
            assert torch.equal(part[0], whole[e])
            checked += 1
    assert checked == 16


def test_tensors_that_the_base_gives_otherwise_are_refused(tmp_path):
    model = make("LlamaForCausalLM")
    stir(ad.attach(model, "svft:pattern=banded,band=2"), 0.1).save(tmp_path / "a.safetensors")
    held = stored(make("LlamaForCausalLM"), tmp_path / "a.safetensors")
    site, m = held.plan[0]
    with (
        filled(held.model, {site.tensor_path: torch.randn(site.weight.shape)}, names_of(held.model)),
        pytest.raises(AddendaError, match="come out differently"),
    ):
        held.at(site, m)


def test_the_base_may_be_the_one_that_was_rounded(tmp_path):
    model = make("LlamaForCausalLM")
    half = transformers.LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    ad.attach(half.bfloat16(), "lora:rank=2").save(tmp_path / "a.safetensors")
    held = stored(make("LlamaForCausalLM"), tmp_path / "a.safetensors")
    site, _ = held.plan[0]
    W, names = model.get_parameter(site.tensor_path).detach(), names_of(held.model)
    assert held.mismatch(site, W, names, "exact") is None
    assert held.mismatch(site, W.bfloat16(), names, "exact") is None
    assert held.mismatch(site, W * 1.02, names, "exact") == site.path
    assert held.mismatch(site, W.half(), names, "compatible") is None
    assert held.mismatch(site, W * 1.02, names, "compatible") == site.path
