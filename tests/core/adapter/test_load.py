"""Loads in part: what is left out is said, shown and not saved unasked; what is damaged is never a part."""

import copy
import warnings

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.adapter import build
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.forward.slots import slots_of
from shared import EVERY, METHODS, attach, bits, read_raw, same_bits, stir, where, write_raw


def saved(name, tiny, ids, file, **options):
    adapter = stir(attach(tiny, name, ids, **({"targets": where(name)} | options)))
    held = {path: [t.clone() for t in tensors.held().values()] for path, tensors in adapter.sites()}
    adapter.save(file)
    ad.detach(tiny)
    return held


def in_part(model, file, **options) -> ad.Adapter:
    with pytest.warns(UserWarning, match=r"sites of .* were left out: .* left_out has them all"):
        return ad.load(model, file, allow_partial=True, **options)


@pytest.mark.parametrize("name", EVERY)
def test_sites_that_fit_are_what_they_were_in_the_whole(name, tiny, ids, tmp_path):
    """Where the second block's weights are others: with random tensors and pools of training, or an error."""
    file, tiny = tmp_path / "a.safetensors", tiny.eval()
    held = saved(name, tiny, ids, file)
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for p in other.layers[1].parameters():
            p.mul_(1.5)
    before = bits(other)
    here = {path for path in held if "layers.1" not in path}
    if not here:
        pytest.fail("this says nothing")
    if len(here) == len(held):
        assert not ad.load(other, file, allow_partial=True).left_out
        return
    adapter = in_part(other, file)
    assert adapter.methods.keys() == here
    assert adapter.left_out == dict.fromkeys(held.keys() - here, "the model has other weights there than in training")
    for path, tensors in adapter.sites():
        assert all(torch.equal(a, b) for a, b in zip(held[path], tensors.held().values(), strict=True))
    assert f"{len(held) - len(here)} sites of its file left out" in ad.status(other)
    with pytest.raises(AddendaError, match="is a part of its file"):
        adapter.save(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    y = other(ids)
    part = adapter.save(tmp_path / "b.safetensors", partial=True)
    assert read(part)[0].note["left_out"].keys() == held.keys() - here
    ad.detach(other)
    assert same_bits(bits(other), before)
    again = ad.load(other, part)
    assert torch.equal(other(ids), y)
    assert not again.left_out
    assert again.save(tmp_path / "c.safetensors").read_bytes() == part.read_bytes()


@pytest.mark.parametrize("name", EVERY)
def test_what_sites_share_is_that_of_all_of_them_or_nothing_is_loaded(name, tiny, ids, tmp_path):
    """Where the wide layers are left out, shared tensors would be drawn for narrower ones."""
    file, tiny = tmp_path / "a.safetensors", tiny.eval()
    held = saved(name, tiny, ids, file)
    for block in tiny.layers:
        block.up_proj, block.down_proj = nn.Linear(8, 20), nn.Linear(20, 8)
    told = ""
    try:
        with warnings.catch_warnings(action="ignore"):
            ad.load(tiny, file, allow_partial=True)
    except AddendaError as error:
        told = str(error)
    assert bool(told) == (not any(slots_of(m) for m in tiny.modules()))
    shared = METHODS[name].has("shared")
    assert ("share tensors that are made for all of them" in told) == shared, told
    for path, tensors in [] if told else ad.adapters(tiny)["default"].sites():
        assert all(torch.equal(a, b) for a, b in zip(held[path], tensors.held().values(), strict=True))


def test_every_reason_is_told_and_labels_go_with_their_head(tiny, ids, tmp_path):
    file = tmp_path / "a.safetensors"
    adapter = stir(ad.attach(tiny, ad.LoRA(rank=2), targets="linear", also_train=["score"]))
    adapter.labels = ["a", "b", "c", "d"]
    adapter.save(file)
    ad.detach(tiny)
    tiny.score = nn.Linear(8, 3)
    tiny.layers[0].up_proj = nn.Linear(8, 12)
    del tiny.layers[1].self_attn.q_proj
    with torch.no_grad():
        tiny.layers[1].down_proj.weight.mul_(2)
    with pytest.raises(AddendaError, match="does not fit"):
        ad.load(tiny, file)
    adapter = in_part(tiny, file, trainable=True)
    assert adapter.left_out == {
        "score.weight": "the file has parameter [4, 8], the model parameter [3, 8]",
        "score.bias": "the file has parameter [4], the model parameter [3]",
        "layers.0.up_proj": "the file has linear [16, 8], the model linear [12, 8]",
        "layers.1.self_attn.q_proj": "the model has no module and no parameter of this path",
        "layers.1.down_proj": "the model has other weights there than in training",
    }
    assert adapter.labels == ()
    assert len(adapter.methods) == 9
    assert all(p.requires_grad for p in adapter.parameters())


def test_what_uses_a_part_says_so(tiny, ids, tmp_path):
    file = tmp_path / "a.safetensors"
    saved("lora", tiny, ids, file)
    with torch.no_grad():
        tiny.layers[1].down_proj.weight.mul_(2)
    adapter = in_part(tiny, file)
    for call in (
        lambda: ad.export(adapter, "peft", tmp_path / "out"),
        lambda: ad.reduce([adapter], "lora", rank=1),
        lambda: ad.combine([adapter], how="cat"),
    ):
        with pytest.raises(AddendaError, match=r"is a part of its file.*partial=True"):
            call()
    assert not (tmp_path / "out").exists()
    assert "a part of its file: 1 sites were left out" in str(ad.merge(tiny, verify=ids))


@pytest.mark.parametrize("name", EVERY)
def test_no_method_runs_on_another_base(name, tiny, ids, tmp_path, monkeypatch):
    """The base's bytes are compared before a method is asked for anything on a weight: a decomposition, a mask."""
    saved(name, tiny, ids, tmp_path / "a.safetensors")
    with torch.no_grad():
        for p in tiny.parameters():
            p.add_(0.01)
    asked = []
    monkeypatch.setattr(build, "_derived", lambda site, *_: asked.append(site.path) or {})
    with pytest.raises(AddendaError, match="trained on other base weights"):
        ad.load(tiny, tmp_path / "a.safetensors")
    assert not asked


def test_nothing_fits_or_the_file_is_damaged(tiny, ids, tmp_path):
    file = tmp_path / "a.safetensors"
    saved("lora", tiny, ids, file)
    with pytest.raises(AddendaError, match=r"Nothing of .* fits.*12 of 12 sites"):
        ad.load(nn.Sequential(nn.Linear(3, 3)), file, allow_partial=True)
    header, tensors = read_raw(file)
    wrong = dict(tensors) | {"layers.0.up_proj/A": torch.zeros(4, 9)}
    with pytest.raises(AddendaError, match="tensors that do not fit, and nothing was loaded"):
        ad.load(tiny, write_raw(tmp_path / "b.safetensors", header, wrong), allow_partial=True)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    (tmp_path / "c.safetensors").write_bytes(data)
    with pytest.raises(AddendaError):
        ad.load(tiny, tmp_path / "c.safetensors", allow_partial=True)
    assert not any(slots_of(m) for m in tiny.modules())


def test_a_whole_that_fits_is_no_part(tiny, ids, tmp_path):
    file = tmp_path / "a.safetensors"
    saved("vera", tiny, ids, file)
    adapter = ad.load(tiny, file, allow_partial=True)
    assert adapter.left_out == {}
    assert adapter.save(tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_an_error_says_when_a_part_could_be_loaded(tiny, ids, tmp_path):
    file = tmp_path / "a.safetensors"
    saved("lora", tiny, ids, file)
    tiny.layers = tiny.layers[:1]
    with pytest.raises(AddendaError, match=r"6 of 12 sites are there and alike; with allow_partial=True load takes"):
        ad.load(tiny, file)
    with pytest.warns(UserWarning, match="6 of 12 sites"):
        ad.load(tiny, file, allow_partial=True)


def test_a_part_may_be_found_under_other_names(tiny, ids, tmp_path):
    file = tmp_path / "a.safetensors"
    saved("lora", tiny, ids, file)
    other = nn.ModuleDict({"m": tiny, "layers": nn.ModuleList([copy.deepcopy(tiny.layers[0])])})
    with pytest.warns(UserWarning, match=r"6 of 12 sites .* With rename="):
        ad.load(other, file, allow_partial=True)
    ad.detach(other)
    assert not ad.load(other, file, rename={"*": "m.*"}, allow_partial=True).left_out


@pytest.mark.parametrize("base", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_file_is_written_again_to_the_byte_in_the_dtypes_it_has(name, base, tiny, ids, tmp_path):
    """Parameters in float32, then in the half of the base: a load changes no dtype, so that a save writes the same."""
    tiny = tiny.to(base)
    adapter = stir(attach(tiny, name, ids, targets=where(name), also_train=["score"]))
    adapter.labels, adapter.model.__dict__["_addenda"].records["default"].step = ["a", "b", "c", "d"], 7
    for own in (torch.float32, torch.bfloat16):
        if own != torch.float32:
            for p in adapter.parameters():
                p.data = p.data.to(own)
        first = adapter.save(tmp_path / "first.safetensors")
        ad.detach(tiny)
        adapter = ad.load(tiny, first)
        assert {p.dtype for p in adapter.parameters()} == {own}
        assert adapter.step_count == 7
        assert adapter.save(tmp_path / "second.safetensors").read_bytes() == first.read_bytes()
        with_basis = adapter.save(tmp_path / "third.safetensors", basis=True)
        ad.detach(tiny)
        adapter = ad.load(tiny, with_basis, trainable=True)
        assert adapter.save(tmp_path / "fourth.safetensors", basis=True).read_bytes() == with_basis.read_bytes()


@pytest.mark.parametrize("bits", [1, 3])
def test_codes_and_what_training_moves_are_written_again_to_the_byte(bits, tiny, ids, tmp_path):
    adapter = stir(ad.attach(tiny, ad.LoRA(rank=2, bits=bits), targets="linear", also_train=["score"], head_bits=2))
    for latent in (True, False):
        first = adapter.save(tmp_path / "first.safetensors", latent=latent)
        ad.detach(tiny)
        adapter = ad.load(tiny, first)
        assert adapter.save(tmp_path / "second.safetensors", latent=latent).read_bytes() == first.read_bytes()
