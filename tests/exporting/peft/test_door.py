"""The door as users open it: export proves itself, import takes it back, in this process and in fresh ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from peft_folders import in_peft, outputs, same
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def make_untied() -> nn.Module:
    return toys.make_llama(tie_word_embeddings=False)


ROWS = {
    "low rank": (make_untied, {"q_proj": ad.LoRA(rank=2), "mlp.*": ad.DyLoRA(rank=2)}, ["lm_head"]),
    "tied": (toys.make_llama, {"model.embed_tokens.weight": ad.LoRA(rank=2)}, []),
    "experts": (toys.make_mixtral, {"*.gate_up_proj": ad.LoRA(rank=2), "*.down_proj": ad.LoRA(rank=1)}, []),
    "dora": (make_untied, {"linear": ad.DoRA(rank=2)}, []),
    "pissa": (toys.make_gpt2, {"c_attn": ad.LoRA(rank=2, origin="pissa")}, []),
    "tokens and norms": (
        make_untied, {"model.embed_tokens": ad.TrainableTokens(tokens="5+10"), "norm": ad.LNTuning()}, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_an_export_proves_itself_beside_the_live_adapter(row, tmp_path):
    make, spec, heads = ROWS[row]
    model = make()
    base = outputs(model, IDS)
    adapter = stir(ad.attach(model, spec, also_train=heads), 0.4)
    wanted = outputs(model, IDS)
    report = ad.export(adapter, "peft", tmp_path / "out")
    assert report.exact and report.effect.moved > 0
    same(in_peft(make, tmp_path / "out", IDS), wanted, base)
    again = make()
    ad.import_adapter(again, tmp_path / "out")
    same(outputs(again, IDS), wanted, base)


def test_what_is_no_product_needs_a_rank_and_then_passes_as_lora(tmp_path):
    model = make_untied()
    adapter = stir(ad.attach(model, ad.MoRA(rank=2), targets=["q_proj", "up_proj"]), 0.4)
    with pytest.raises(AddendaError, match="rank= or energy="):
        ad.export(adapter, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = ad.export(adapter, "peft", tmp_path / "out", rank=4)
    assert not report.exact and (tmp_path / "out").is_dir()


_BY_PEFT = """
import sys, warnings
sys.path[:0] = [{tests!r}]
warnings.simplefilter("ignore")
import peft, torch
from peft_folders import by_peft, in_peft
from exporting.peft.test_door import IDS, make_untied
{what}
"""
_TRAIN = """
config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True, modules_to_save=["lm_head"])
torch.save(by_peft(make_untied, config, {folder!r}, IDS, size=0.3), {result!r})
"""
_LOAD = """
from pathlib import Path
torch.save(in_peft(make_untied, Path({folder!r}), IDS), {result!r})
"""
_HERE = """
import addenda as ad
from peft_folders import outputs
model = make_untied()
adapter = ad.import_adapter(model, {folder!r})
torch.save(outputs(model, IDS), {result!r})
ad.export(adapter, "peft", {out!r})
"""


@pytest.mark.slow
def test_both_ways_in_fresh_processes(tmp_path):
    tests = str(Path(__file__).parents[2])
    trained, taken, loaded = (str(tmp_path / n) for n in ("trained.pt", "taken.pt", "loaded.pt"))
    steps = (
        _TRAIN.format(folder=str(tmp_path / "peft"), result=trained),
        _HERE.format(folder=str(tmp_path / "peft"), result=taken, out=str(tmp_path / "back")),
        _LOAD.format(folder=str(tmp_path / "back"), result=loaded),
    )
    for what in steps:
        subprocess.run([sys.executable, "-c", _BY_PEFT.format(tests=tests, what=what)], check=True, timeout=300)
    wanted, base = torch.load(trained, weights_only=True), outputs(make_untied(), IDS)
    same(torch.load(taken, weights_only=True), wanted, base)
    same(torch.load(loaded, weights_only=True), wanted, base)
