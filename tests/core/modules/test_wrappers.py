"""Which modules are passed by on the way to the model: wrappers, and none of the user's that only looks like one."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import addenda as ad
from addenda.core.modules.wrappers import unwrap
from shared import loss_of, stir


class DeepSpeedEngine(nn.Module):
    """Looks as DeepSpeed's does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Own(DeepSpeedEngine):
    """A class derived from a wrapper."""


class Heated(nn.Module):
    """A module of the user's own around a model, with a parameter."""

    def __init__(self, module):
        super().__init__()
        self.module, self.temperature = module, nn.Parameter(torch.ones(()))

    def forward(self, ids):
        return self.module(ids) / self.temperature


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "DeepSpeed": DeepSpeedEngine,
    "derived": Own,
    "twice": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_passed_by(name, tiny):
    inner = unwrap(WRAPPERS[name](tiny))
    assert type(inner) is type(tiny)
    assert inner is tiny or name == "AveragedModel"  # which makes a copy


@pytest.mark.parametrize("made", [Heated, nn.Sequential, lambda m: nn.ModuleDict({"module": m})])
def test_other_modules_around_a_model_are_the_model(made, tiny):
    outer = made(tiny)
    assert unwrap(outer) is outer


def test_a_parameter_around_a_child_called_module_is_the_bases(tiny, ids, tmp_path):
    model = Heated(tiny)
    adapter = stir(ad.attach(model, "lora:rank=2", targets="linear", also_train=["temperature"]))
    assert {"temperature", "module.layers.0.up_proj"} <= adapter.methods.keys()
    loss_of(model, ids).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    file, want = adapter.save(tmp_path / "a.safetensors"), model(ids)
    ad.detach(model)
    ad.load(model, file)
    assert torch.equal(model(ids), want)
    ad.detach(model)
    ad.attach(model, "lora:rank=2", targets="linear")
    assert not model.temperature.requires_grad


TAKE_A_MODEL = {
    "adapters": lambda m: ad.adapters(m),
    "attach": lambda m: ad.attach(m, "lora"),
    "detach": lambda m: ad.detach(m),
    "disabled": lambda m: ad.disabled(m).__enter__(),
    "lean": lambda m: ad.lean(m),
    "unlean": lambda m: ad.unlean(m),
    "load": lambda m: ad.load(m, "a.safetensors"),
    "macs": lambda m: ad.macs(m, torch.ones(1)),
    "merge": lambda m: ad.merge(m),
    "passage": lambda m: ad.passage(m, "lora", "vllm"),
    "plan": lambda m: ad.plan(m, "lora"),
    "quantize": lambda m: ad.quantize(m),
    "adopt": lambda m: ad.adopt(m),
    "recalibrate": lambda m: ad.recalibrate(m, [torch.ones(1)]),
    "reranker": lambda m: ad.Reranker(m, None),
    "shrink": lambda m: ad.shrink(m),
    "status": lambda m: ad.status(m),
    "switch": lambda m: ad.switch(m, None),
    "trained rank pruning": lambda m: ad.TrainedRankPruning(m, energy=0.9),
    "unmerge": lambda m: ad.unmerge(m),
}


@pytest.mark.parametrize("call", TAKE_A_MODEL.values(), ids=TAKE_A_MODEL)
def test_a_folder_in_the_place_of_a_model_is_told(call):
    """`tune` and `compress` take folders: what they stand beside says that it does not."""
    with pytest.raises(ad.AddendaError, match=r"Expected a torch.nn.Module as the model, got str. Load it first"):
        call("models/mine")
