"""Calls inside `torch.inference_mode`: what they make can be trained outside of it, where the model can."""

import pytest
import torch

import addenda as ad
import toys
from shared import EVERY, attach, bits, loss_of, same_bits, stir, where


@pytest.mark.parametrize("name", EVERY)
def test_what_is_made_in_inference_mode_trains_outside(name, tiny, ids, tmp_path):
    before = bits(tiny)
    with torch.inference_mode():
        adapter = attach(tiny, name, ids, targets=where(name))
        stir(adapter)
        expected = tiny(ids).clone()
        adapter.save(tmp_path / "a.safetensors")
        ad.switch(tiny, None)
        ad.switch(tiny, "default")
    loss_of(tiny, ids).backward()
    assert any(p.grad is not None for p in adapter.parameters())
    ad.detach(tiny)
    with torch.inference_mode():
        adapter = ad.load(tiny, tmp_path / "a.safetensors", trainable=True)
        torch.testing.assert_close(tiny(ids), expected)
    loss_of(tiny, ids).backward()
    ad.detach(tiny)
    assert same_bits(bits(tiny), before)


def test_merging_in_inference_mode_in_another_dtype_leaves_a_model_that_trains(tiny, ids):
    tiny.to(torch.bfloat16)
    before = bits(tiny)
    adapter = stir(ad.attach(tiny, "lora:rank=2"))
    with torch.inference_mode():
        ad.merge(tiny, dtype=torch.float32)
        ad.unmerge(tiny)
    loss_of(tiny, ids).backward()
    assert adapter.parameters()[0].grad is not None
    assert same_bits(bits(tiny), before)


@pytest.fixture(params=[1, 3])
def threads(request):
    """How many threads torch has: beyond one, tensors of several sites are made side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_model_made_in_inference_mode_is_used_everywhere_and_stays_so(ids, tmp_path):
    with torch.inference_mode():
        model = toys.Tiny()
    before = bits(model)
    adapter = ad.attach(model, "lora:rank=2")
    with torch.no_grad():
        adapter.save(tmp_path / "a.safetensors")
        ad.merge(model)
        model(ids)
        ad.unmerge(model)
        ad.detach(model)
        ad.load(model, tmp_path / "a.safetensors")
        ad.switch(model, None)
    ad.detach(model)
    assert same_bits(bits(model), before)
