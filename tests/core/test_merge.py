"""Merging: exact where it can be, refused where rounding takes the change, and always undone exactly."""

import copy

import pytest
import torch
from shared import bits, relative, same_bits, stir
from torch import nn

import addenda as ad
from addenda.core.errors import AddendaError
from addenda.core.merge import _rounded
from addenda.core.random import Stream

LORA = ad.LoRA(rank=2)


def test_float32_merge_proves_itself(llama, ids):
    stir(ad.attach(llama, LORA), 0.3)
    y = llama(ids).logits
    report = ad.merge(llama, verify={"input_ids": ids})
    assert report.top1 == 1.0
    assert report.kl <= 2 * report.noise_kl + 1e-9
    assert report.dtype == "float32"
    assert set(report.sites) == set(ad.adapters(llama)["default"].methods)
    assert "merged 14 sites in float32" in str(report)
    assert relative(llama(ids).logits, y) < 1e-5
    assert "base merged" in ad.status(llama)


def test_a_small_change_in_bfloat16_is_refused_and_undone(tiny, ids):
    tiny.bfloat16()
    stir(ad.attach(tiny, LORA), 0.001)
    before, y = bits(tiny), tiny(ids)
    with pytest.raises(AddendaError, match=r"The merge was undone.*rounding='stochastic'"):
        ad.merge(tiny)
    assert same_bits(bits(tiny), before)
    assert torch.equal(tiny(ids), y)
    report = ad.merge(tiny, allow_loss=1.0)
    assert report.total > 0.25
    ad.unmerge(tiny)
    assert same_bits(bits(tiny), before)
    ad.merge(tiny, dtype=torch.float32)
    assert tiny.score.weight.dtype == torch.float32


def test_stochastic_rounding_is_unbiased_and_seeded():
    exact = torch.full((20_000,), 1.0 + 2.0**-10)
    rounded = _rounded(exact, torch.bfloat16, "stochastic", Stream(0, "x"))
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert abs(float(rounded.float().mean()) - float(exact[0])) < 2e-4
    assert torch.equal(rounded, _rounded(exact, torch.bfloat16, "stochastic", Stream(0, "x")))
    negative = _rounded(-exact, torch.bfloat16, "stochastic", Stream(0, "x"))
    assert abs(float(negative.float().mean()) + float(exact[0])) < 2e-4
    kept = torch.tensor([0.0, 1.0, -2.5])
    assert torch.equal(_rounded(kept, torch.bfloat16, "stochastic", Stream(0)).float(), kept)


def test_wrong_states(tiny, ids):
    stir(ad.attach(tiny, LORA))
    with pytest.raises(AddendaError, match="Nothing is merged"):
        ad.unmerge(tiny)
    with pytest.raises(AddendaError, match="rounding must be"):
        ad.merge(tiny, rounding="up")
    with pytest.raises(AddendaError, match="keep_merged=True wants"):
        ad.detach(tiny, keep_merged=True)
    ad.merge(tiny)
    for call in (lambda: ad.merge(tiny), lambda: ad.switch(tiny, None), lambda: ad.attach(tiny, LORA, name="b")):
        with pytest.raises(AddendaError, match="merged"):
            call()
    ad.unmerge(tiny)
    ad.switch(tiny, None)
    with pytest.raises(AddendaError, match="No adapter is active"):
        ad.merge(tiny)


def test_modes_and_flags_are_given_back(tiny, ids):
    stir(ad.attach(tiny, LORA))
    tiny.train()
    tiny.layers[0].eval()
    ad.merge(tiny, verify=ids)
    assert tiny.layers[1].up_proj.training
    assert not tiny.layers[0].up_proj.training


def test_a_batch_of_floats_is_widened_with_the_model(tiny_conv, vit):
    stir(ad.attach(tiny_conv, LORA, targets=["conv", "score"]), 0.2)
    ad.merge(tiny_conv, verify=torch.randn(2, 4, 8))
    stir(ad.attach(vit, LORA), 0.2)
    ad.merge(vit, verify={"pixel_values": torch.randn(1, 3, 8, 8)})


def test_detaching_while_merged(tiny, ids):
    before = bits(tiny)
    stir(ad.attach(tiny, LORA, also_train=["score"]))
    y = tiny(ids)
    ad.merge(tiny)
    ad.detach(tiny)
    assert same_bits(bits(tiny), before)
    stir(ad.attach(tiny, LORA, also_train=["score"]))
    ad.merge(tiny)
    ad.detach(tiny, keep_merged=True)
    assert not same_bits(bits(tiny), before)
    assert relative(tiny(ids), y) < 1e-5
    assert all(p.requires_grad for p in tiny.parameters())


def test_one_of_two_merged_goes(tiny, ids):
    stir(ad.attach(tiny, LORA, name="a"), 0.3)
    y = tiny(ids)
    stir(ad.attach(tiny, LORA, name="b"), 0.3, seed=4)
    ad.switch(tiny, ["a", "b"])
    before = bits(tiny)
    ad.merge(tiny)
    twin = copy.deepcopy(tiny)
    ad.detach(tiny, "b")
    assert same_bits(bits(tiny), before)
    assert torch.equal(tiny(ids), y)
    ad.unmerge(twin)
    assert same_bits(bits(twin), before)


def test_a_failing_batch_restores_the_base(tiny, ids):
    stir(ad.attach(tiny, LORA))
    before = bits(tiny)
    calls, real = [], type(tiny).forward

    def forward(*a):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("late")
        return real(tiny, *a)

    tiny.forward = forward
    with pytest.raises((RuntimeError, AddendaError)):
        ad.merge(tiny, verify=ids)
    del tiny.forward
    assert same_bits(bits(tiny), before)
    ad.merge(tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sparse_change_touches_its_entries_only(dtype, tiny):
    """One adapter, and two that overlap: the dense sum, the base's bits elsewhere, and all of them afterwards."""
    tiny.to(dtype)
    before = bits(tiny)
    for name, density in (("one", 0.2), ("two", 0.4)):
        stir(ad.attach(tiny, ad.SHiRA(density=density), name=name), 0.5, seed=len(name) + int(density * 10))
    for names in (("one",), ("one", "two")):
        ad.switch(tiny, names)
        want = {p: effective_at(tiny, p, names).to(dtype) for p in ad.adapters(tiny)["one"].methods}
        report = ad.merge(tiny, allow_loss=1.0)
        after = bits(tiny)
        for path, weight in want.items():
            assert torch.equal(after[f"{path}.weight"], weight), path
            kept = (after[f"{path}.weight"] == before[f"{path}.weight"]).float().mean()
            assert kept > 0.3, "most entries are the base's own"
        assert report.sites.keys() == want.keys()
        ad.unmerge(tiny)
        assert same_bits(bits(tiny), before)


def effective_at(model, path, names):
    from addenda.core.state import tensors_at

    W = model.get_submodule(path)._parameters["weight"].detach().float()
    return W + sum(tensors_at(model, n, path).method.delta(W, tensors_at(model, n, path).tensors()) for n in names)


def test_a_file_saved_while_a_sparse_change_is_merged_fits_the_base(tiny, tmp_path):
    fresh = copy.deepcopy(tiny)
    adapter = stir(ad.attach(tiny, ad.SHiRA(density=0.2)), 0.5)
    ad.merge(tiny, allow_loss=1.0)
    y = tiny(torch.arange(6)[None])
    path = ad.save(adapter, tmp_path / "a.safetensors")
    ad.load(fresh, path)
    torch.testing.assert_close(fresh(torch.arange(6)[None]), y)


def test_what_is_not_finite_is_no_proof(ids):
    """A change that overflows float16, and outputs that are NaN before anything is merged."""
    x = torch.ones(2, 8, dtype=torch.float16) / 1024
    model = nn.Sequential(nn.Linear(8, 8)).half()
    adapter = ad.attach(model, ad.LoRA(rank=2))
    with torch.no_grad():
        model[0].weight.fill_(60000.0)
        for p in adapter.parameters():
            p.fill_(100.0)
    before, y = bits(model), model(x)
    assert y.isfinite().all()
    for options in ({"verify": x}, {}, {"verify": x, "allow_loss": 1.0}, {"allow_loss": 1.0}):
        with pytest.raises(AddendaError, match=r"was undone: the .* not finite in float16.*6\.55e\+04"):
            ad.merge(model, **options)
        assert same_bits(bits(model), before)
        assert torch.equal(model(x), y)
    ad.merge(model, verify=x.float(), dtype=torch.float32)
    ad.unmerge(model)
    with pytest.raises(AddendaError, match=r"not finite before anything is merged: 16 of 16, in torch\.float16"):
        ad.merge(model, verify=x * torch.nan)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("logits", [False, True])
def test_outputs_that_become_nan_undo_the_merge(logits, tiny, ids, monkeypatch):
    """NaN is neither above nor below the noise, in distances and in KL."""
    from addenda.core import merge as merging

    if logits:
        tiny.__dict__["config"] = None  # as a transformers model has
    stir(ad.attach(tiny, LORA))
    before, outputs, real = bits(tiny), [], merging._outputs

    def seen(model, batch):
        outputs.append(real(model, batch))
        return outputs[-1] if len(outputs) % 3 else outputs[-1] * torch.nan  # the third is behind the merge

    monkeypatch.setattr(merging, "_outputs", seen)
    for options in ({}, {"allow_loss": 1.0}):
        with pytest.raises(AddendaError, match="The merge was undone: the outputs are not finite in float32"):
            ad.merge(tiny, verify=ids, **options)
        assert same_bits(bits(tiny), before)


def exact(model):
    """Every parameter and buffer, adapters' included, with its dtype."""
    return {k: t.clone() for k, t in [*model.named_parameters(), *model.named_buffers()]}


def the_same(model, before):
    after = exact(model)
    return after.keys() == before.keys() and all(
        t.dtype == after[k].dtype and torch.equal(t, after[k]) for k, t in before.items()
    )


def test_a_failed_conversion_gives_all_dtypes_and_bits_back(tiny, ids):
    adapter = stir(ad.attach(tiny, LORA), 0.001)
    tiny(ids).sum().backward()
    before, y = exact(tiny), tiny(ids).detach()
    for options in ({}, {"verify": torch.zeros(2, 2)}):  # rounding takes too much; embeddings look up no floats
        with pytest.raises((AddendaError, RuntimeError)):
            ad.merge(tiny, dtype=torch.bfloat16, **options)
        assert the_same(tiny, before) and all(p.grad.dtype == p.dtype for p in adapter.parameters())
        assert torch.equal(tiny(ids), y)


def test_unmerge_converts_back(tiny, ids, tmp_path):
    stir(ad.attach(tiny, LORA), 0.3)
    tiny.register_buffer("scale", torch.rand(3))
    before, y = exact(tiny), tiny(ids).detach()
    ad.merge(tiny, dtype=torch.bfloat16, allow_loss=1.0)
    assert {p.dtype for p in tiny.parameters()} == {torch.bfloat16}
    twin, gone = copy.deepcopy(tiny), copy.deepcopy(tiny)
    for model in (tiny, twin):
        ad.unmerge(model)
        assert the_same(model, before)
        assert torch.equal(model(ids), y)
    ad.detach(gone, keep_merged=True)
    assert {t.dtype for t in [*gone.parameters(), *gone.buffers()]} == {torch.bfloat16}
    ad.merge(tiny, dtype=torch.float64)
    ad.detach(tiny)
    assert {t.dtype for t in [*tiny.parameters(), *tiny.buffers()]} == {torch.float32}
