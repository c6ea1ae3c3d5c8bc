"""The comparison of a merged folder with its base and adapters: what it measures, and what it refuses."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.exporting.folder_model import FolderModel
from addenda.exporting.merge_check import compare_folders
from addenda.exporting.stored import StoredAdapter
from addenda.models.checkpoint_files import SINGLE
from shared import stir
from tiny_models import make_llama

IDS = torch.arange(1, 25).view(2, 12)
BATCH = {"input_ids": IDS}


def both(tmp_path, size=0.1, method="lora:rank=2", targets="linear"):
    """A base, an adapter of it, and the model merged in memory, saved."""
    make_llama().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapter = stir(ad.attach(model, method, targets=targets), size) if size else ad.attach(model, method)
    adapter.save(tmp_path / "a.safetensors")
    live = model(**BATCH).logits.detach()
    if size:
        ad.merge(model)
    ad.detach(model, keep_merged=bool(size))
    model.save_pretrained(tmp_path / "merged")
    source = FolderModel.of(tmp_path / "base")
    return source, StoredAdapter.of(tmp_path / "a.safetensors", *read(tmp_path / "a.safetensors"), source.model), live


def compare(source, adapter, tmp_path, batch=BATCH, **options):
    given = {"dtype": torch.float32, "base": "exact"} | options
    return compare_folders(source, tmp_path / "merged", [adapter], batch, **given)


def test_equal_models_are_within_and_the_effect_is_measured(tmp_path):
    source, adapter, live = both(tmp_path)
    found = compare(source, adapter, tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")(**BATCH).logits.detach()
    assert found.verdict.within and found.logits <= 1e-5
    assert found.effect == pytest.approx(float((live - base).norm() / base.norm()), rel=1e-4)
    assert not found.notes


def test_a_weight_that_was_forgotten_is_seen(tmp_path):
    source, adapter, live = both(tmp_path)
    tensors, base = load_file(tmp_path / "merged" / SINGLE), load_file(tmp_path / "base" / SINGLE)
    tensors["model.layers.1.mlp.down_proj.weight"] = base["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "merged" / SINGLE, {"format": "pt"})
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")(**BATCH).logits.detach()
    found = compare(source, adapter, tmp_path)
    assert not found.verdict.within
    assert found.logits == pytest.approx(float((live - merged).abs().max()), rel=1e-3)
    assert compare(source, adapter, tmp_path, excused=1.0).verdict.limit > found.verdict.limit


def test_a_weight_that_is_missing_is_named(tmp_path):
    source, adapter, _ = both(tmp_path)
    tensors = load_file(tmp_path / "merged" / SINGLE)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "merged" / SINGLE, {"format": "pt"})
    with pytest.raises(AddendaError, match=r"does not load whole: model\.norm\.weight"):
        compare(source, adapter, tmp_path)


def test_an_adapter_that_moves_nothing_proves_nothing(tmp_path):
    source, adapter, _ = both(tmp_path, size=0)
    with pytest.raises(AddendaError, match="moves no output of the probe batch"):
        compare(source, adapter, tmp_path)


def test_a_batch_that_hardly_shows_the_change_is_noted(tmp_path):
    source, adapter, _ = both(tmp_path, size=1e-7)
    assert any("hardly shows the change" in note for note in compare(source, adapter, tmp_path).notes)
