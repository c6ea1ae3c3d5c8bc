"""PEFT's ADALORA: cut ranks, and a scale that has 1e-5 in it."""

import json

import peft
import pytest
import torch

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from peft_folders import CONFIG, by_peft, edited, given, in_addenda, in_peft, outputs, quiet, same, take
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def config():
    return peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=8, target_modules=["q_proj", "o_proj"])


def _prune(model) -> None:
    """Leave some ranks of each site to the folder, as the end of PEFT's budget does, none of one."""
    names = [n for n, _ in model.base_model.model.named_parameters() if ".lora_E." in n]
    kept = [[True, False, True, True], [False] * 4, [True] * 4, [False, True, False, False]]
    model.peft_config["default"].rank_pattern = dict(zip(names, kept, strict=True))
    with torch.no_grad():
        for n, k in zip(names, kept, strict=True):
            model.base_model.model.get_parameter(n).mul_(torch.tensor(k)[:, None])


def test_ranks_that_the_budget_took_are_cut_and_keep_their_scale(tmp_path):
    base = outputs(toys.make_llama(), IDS)
    wanted = by_peft(toys.make_llama, config(), tmp_path / "peft", IDS, size=0.5, change=_prune)
    adapter, found = in_addenda(toys.make_llama, tmp_path / "peft", IDS)
    same(found, wanted, base)
    assert sorted(m.rank for m in adapter.methods.values()) == [1, 3, 4]  # of the fourth site nothing is left
    folder = given(adapter, tmp_path / "back")
    same(in_peft(toys.make_llama, folder, IDS), wanted, base)
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"] == "ADALORA"


def test_the_small_number_in_the_scale_is_not_lost(tmp_path):
    model = toys.make_llama()
    adapter = stir(ad.attach(model, ad.AdaLoRA(rank=1, target_rank=1, alpha=3), targets="q_proj"), 1.0)
    deltas = {p: t.B @ torch.diag(t.E) @ t.A * 3 for p, t in adapter.sites()}
    given(adapter, tmp_path / "out")
    with quiet():
        loaded = peft.PeftModel.from_pretrained(toys.make_llama(), str(tmp_path / "out"))
    for path, wanted in deltas.items():
        found = loaded.base_model.model.get_submodule(path).get_delta_weight("default")
        assert (found - wanted).norm() < 1e-6 * wanted.norm()  # 1e-5 without it


def test_patterns_that_are_none_are_refused(tmp_path):
    by_peft(toys.make_llama, config(), tmp_path / "peft", IDS)
    for pattern, words in (
        ([1], "a dict by path"),
        ({"model.layers.0.self_attn.q_proj.lora_E": 3}, "a list is wanted"),
    ):
        edited(tmp_path / "peft", {"rank_pattern": pattern})
        with pytest.raises(AddendaError, match=words):
            take(toys.make_llama(), tmp_path / "peft")
    edited(tmp_path / "peft", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False]}})
    with pytest.raises(AddendaError, match=r"\[4, 8\], and the config and the model say \[2, 8\]"):
        take(toys.make_llama(), tmp_path / "peft")
