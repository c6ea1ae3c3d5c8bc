"""GGUF as a door of export and import."""

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.exporting.gguf.door import write
from addenda.exporting.gguf.read import read
from addenda.exporting.pairs import low_rank
from gguf_base import apart, logits, make


def moved(kind: str, method, targets):
    model = make(kind)
    adapter = ad.attach(model, method, targets=targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    return model, adapter


def test_out_and_in_again(tmp_path):
    model, adapter = moved("llama", ad.LoRA(rank=4), "linear")
    live = logits(model)
    report = ad.export(adapter, "gguf", tmp_path / "a.gguf")
    assert report.exact and report.bytes == (tmp_path / "a.gguf").stat().st_size
    ad.detach(model)
    before = logits(model)
    ad.import_adapter(model, tmp_path / "a.gguf")
    assert apart(live, before) > 0.01
    assert apart(logits(model), live) < 1e-6


def test_half_precision_says_what_it_loses(tmp_path):
    model, adapter = moved("qwen2", ad.LoRA(rank=3), ["*.q_proj", "*.up_proj"])
    pairs = low_rank(adapter)
    assert write(adapter, tmp_path / "full.gguf", pairs) == {}
    losses = write(adapter, tmp_path / "half.gguf", pairs, dtype="f16")
    assert losses.keys() == pairs.keys()
    for path, (_, p) in read(tmp_path / "half.gguf", model).sites.items():
        product = pairs[path].B.double() @ pairs[path].A.double()
        lost = float((p["B"].double() @ p["A"].double() - product).norm() / product.norm())
        assert 1e-5 < lost < 1e-3
        assert losses[path] == pytest.approx(lost, rel=1e-2)


def test_what_has_no_form_is_refused_before_anything_is_written(tmp_path):
    _, adapter = moved("gpt2", ad.LoRA(rank=3), ["*.c_attn", "transformer.wpe"])
    with pytest.raises(AddendaError, match=r"1 of 3 sites have no form .*transformer\.wpe has no name in a GGUF file"):
        ad.export(adapter, "gguf", tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_small_factors_beside_large_ones_are_no_zeros_in_half_precision(tmp_path):
    _, adapter = moved("qwen2", ad.LoRA(rank=3), ["*.q_proj", "*.up_proj"])
    for _, t in adapter.sites():
        t.B.data *= 1e-7
        t.A.data *= 1e7
    report = ad.export(adapter, "gguf", tmp_path / "a.gguf", dtype="f16")
    assert max(report.errors.values()) < 1e-3 and report.effect.relative < 1e-2
