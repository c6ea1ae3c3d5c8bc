"""PEFT's DELORA: read as a LoRA, also where norms are as small as PEFT lets them be."""

import peft
import torch

import addenda as ad
import toys
from peft_folders import by_peft, given, in_addenda, in_peft, outputs, same
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def test_norms_below_the_least_count_as_it(tmp_path):
    base = outputs(toys.make_llama(), IDS)

    def shrink(model) -> None:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "delora_B" in n:
                    p.mul_(1e-4)

    config = peft.DeloraConfig(r=2, delora_lambda=40.0, target_modules=["q_proj", "up_proj"])
    wanted = by_peft(toys.make_llama, config, tmp_path / "peft", IDS, size=0.3, change=shrink)
    adapter, found = in_addenda(toys.make_llama, tmp_path / "peft", IDS)
    same(found, wanted, base)
    assert {m.name for m in adapter.methods.values()} == {"lora"} and {m.rank for m in adapter.methods.values()} == {2}


def test_ours_is_written_as_lora_of_twice_the_rank(tmp_path):
    model = toys.make_llama()
    base = outputs(model, IDS)
    adapter = stir(ad.attach(model, ad.DeLoRA(rank=2), targets=["q_proj", "up_proj"]))
    wanted = outputs(model, IDS)
    folder = given(adapter, tmp_path / "out")
    same(in_peft(toys.make_llama, folder, IDS), wanted, base)
    back, _ = in_addenda(toys.make_llama, folder, IDS)
    assert {m.rank for m in back.methods.values()} == {4}
