"""Adapters that started inside of W: what PEFT took out of the base is found again, or refused."""

import peft
import pytest
import torch
from torch import nn

import toys
from addenda.core.site.site import site_at
from addenda.exporting.peft import residual
from addenda.exporting.peft.conversion import Saved
from peft_folders import by_peft, edited, in_addenda, outputs, quiet, same, take

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def make_strong() -> nn.Module:
    """A model whose weights are as large as those of trained ones."""
    model = toys.make_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    return model


def pissa() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(("make", "module"), [(toys.make_llama, "mlp.up_proj"), (toys.make_gpt2, "attn.c_proj")])
def test_what_is_left_is_the_base_that_peft_trains_beside(start, make, module):
    model = make()
    path = next(n for n, _ in model.named_modules() if n.endswith(module))
    site = site_at(model, path)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[path], init_lora_weights=start, fan_in_fan_out=site.kind.transposed
    )
    with quiet():
        adapted = peft.get_peft_model(make(), config)
    left = adapted.base_model.model.get_submodule(path).base_layer.weight.detach()
    left = left.T if site.kind.transposed else left
    taken = residual.taken_out({"init_lora_weights": start}, Saved(site, {}), 2, 3.0)
    assert taken is not None
    expected = site.matrix.double() - 3.0 * taken[0].double() @ taken[1].double()
    assert (left - site.matrix).abs().max() > 1e-3
    assert (left.double() - expected).abs().max() < 1e-6


def test_read_as_a_plain_lora_it_would_be_another_model(tmp_path):
    base = outputs(make_strong(), IDS)
    wanted = by_peft(make_strong, pissa(), tmp_path / "peft", IDS)
    adapter, found = in_addenda(make_strong, tmp_path / "peft", IDS)
    same(found, wanted, base)
    assert {m.rank for m in adapter.methods.values()} == {4}
    _, plain = in_addenda(make_strong, edited(tmp_path / "peft", {"init_lora_weights": True}), IDS)
    assert (plain - wanted).abs().max() > 0.01 * wanted.abs().max()


def test_a_folder_that_peft_has_converted_is_a_plain_lora(tmp_path):
    start = tmp_path / "start"
    base = outputs(make_strong(), IDS)

    def keep_start(model) -> None:
        fresh = peft.get_peft_model(make_strong(), pissa())  # as PEFT's guide says, the start is saved as a plain one
        fresh.peft_config["default"].init_lora_weights = True
        fresh.save_pretrained(str(start))
        model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(start))

    wanted = by_peft(make_strong, pissa(), tmp_path / "peft", IDS, change=keep_start)
    model = make_strong()
    adapter = take(model, tmp_path / "plain")
    same(outputs(model, IDS), wanted, base)
    assert {m.rank for m in adapter.methods.values()} == {4}
