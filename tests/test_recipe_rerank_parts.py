"""A language's parts in the recipe of rerankers: both kinds learn from plain texts, and load under a reranker."""

import pytest
import torch
from recipes.rerank_arms import Bench
from recipes.rerank_setting import Setting
from transformers import BertModel

import addenda as ad
from addenda.models.load import load_model
from ranking.toy import ToyTexts, toy_config, toy_tokenizer


@pytest.fixture
def bench(tmp_path):
    torch.manual_seed(0)
    BertModel(toy_config()).save_pretrained(tmp_path / "encoder")
    tokenizer = toy_tokenizer()
    tokenizer.mask_token = ":"
    tokenizer.save_pretrained(tmp_path / "encoder")
    setting = Setting(model="toy", part_steps=3, task_rank=2, part_rank=4, max_length=32)
    return Bench(setting, ToyTexts(tmp_path / "encoder"), kept=tmp_path / "kept")


@pytest.mark.parametrize("kind", ["bottlenecks", "numbers"])
def test_a_part_learns_and_loads_under_a_reranker(bench, kind):
    kept = bench.part(kind, "de")
    file = bench.part_at(kind, "de")
    assert kept["texts"] == 24 and kept["bytes"] == file.stat().st_size and kept["seconds"] > 0
    loaded = load_model(bench.model, task="label", labels=1)
    part = ad.load(loaded.model, file, name="part")
    values = part.state_dict()
    assert not any(path.startswith(("classifier", "cls", "bert.embeddings.word")) for path in values)
    if kind == "numbers":
        assert sum(t.numel() for t in part.parameters()) == bench.numbers(4)
        assert any(bool(t.any()) for t in part.parameters())
    assert not [p for p in file.parent.rglob("*.safetensors") if "step" in p.name]
