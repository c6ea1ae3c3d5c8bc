"""What methods that look at inputs are given: every layer's own rows, without padding."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Replace
from shared import flags, loss_of, same_bits, stir


@dataclass(frozen=True)
class Seen(Replace):
    """Keeps what it was shown."""

    @property
    def calibration(self):
        return "input"

    def calibrate(self, W, what, seen):
        return what.clone() if seen is None else torch.cat([seen, what])

    def init(self, W, rng, p):
        return super().init(W, rng, p) | {"seen": p["calibration"]}


def of(adapter):
    return {path: t.stored()["seen"] for path, t in adapter.sites()}


def test_inputs_of_every_layer_in_order(tiny, ids):
    inputs, paths = {}, ["layers.0.up_proj", "layers.1.down_proj"]
    for path in paths:
        inputs[path] = []
        tiny.get_submodule(path).register_forward_hook(lambda m, x, y, path=path: inputs[path].append(x[0]))
    adapter = ad.attach(tiny, Seen(), targets=paths, calibration=[ids, ids + 1])
    for path, seen in of(adapter).items():
        torch.testing.assert_close(seen, torch.cat([x.flatten(0, 1) for x in inputs[path]]))


def test_padding_is_left_out(llama, ids):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    adapter = ad.attach(llama, Seen(), targets="q_proj", calibration=[batch])
    assert all(len(seen) == 10 for seen in of(adapter).values())


def test_layers_without_inputs_are_refused(tiny, ids):
    with pytest.raises(AddendaError, match=r"1 sites have no inputs .*: embed\. Leave them out"):
        ad.attach(tiny, Seen(), targets=["embed", "linear"], calibration=[ids])
    with pytest.raises(AddendaError, match="calibration"):
        ad.attach(tiny, Seen(), targets="linear")
    assert not hasattr(tiny, "_addenda")
    assert type(tiny.score) is nn.Linear


@pytest.mark.parametrize("method", ["lora-ga:rank=2", "eva:rank=2", "shira:mask=gradient", "shira:mask=snip"])
def test_what_is_seen_is_the_bases_own_whichever_adapter_acts(method, tiny, ids):
    def made(name):
        return ad.attach(tiny, method, targets="linear", name=name, calibration=[ids], loss=loss_of).state_dict()

    want = {k: t.clone() for k, t in made("default").items()}
    ad.detach(tiny)
    stir(ad.attach(tiny, "lora:rank=2", targets="linear", name="other"))
    assert same_bits(made("new"), want)
    with pytest.raises(KeyError):
        ad.attach(tiny, method, targets="linear", name="broken", calibration=[{}], loss=lambda model, batch: batch["x"])
    assert ad.status(tiny).count("active") == 1, "what acted before acts again"
    assert "new: active" in ad.status(tiny)


LOSSES = {
    "no number": lambda model, batch: model(batch),
    "no tensor": lambda model, batch: loss_of(model, batch).item(),
    "nothing": lambda model, batch: None,
    "without a gradient": lambda model, batch: loss_of(model, batch).detach(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_is_none_is_refused(loss, tiny, ids):
    before = flags(tiny)
    with pytest.raises(AddendaError, match=r"one number with a gradient.*loss=function\(model, batch\); got "):
        ad.attach(tiny, "lora-ga:rank=2", targets="linear", calibration=[ids], loss=LOSSES[loss])
    assert flags(tiny) == before and not hasattr(tiny, "_addenda")


@pytest.mark.parametrize("batches", [{"input_ids": torch.ones(1, 2)}, 3])
def test_batches_are_a_list(batches, tiny):
    with pytest.raises(AddendaError, match=r"a list of batches for the model, or a loader; got a \w+\. Give \[batch\]"):
        ad.attach(tiny, Seen(), targets="linear", calibration=batches)


@pytest.mark.parametrize("batch", [{"idz": torch.zeros(1, 3)}, torch.zeros(1, 3), {"ids": torch.tensor([[99]])}])
def test_a_batch_that_does_not_run_is_named_and_leaves_nothing_behind(batch, tiny):
    before = flags(tiny)
    good = {"ids": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(AddendaError, match=r"Batch 1 of calibration= does not run through this Tiny: \w+Error: "):
        ad.attach(tiny, "eva:rank=2", targets="attention", calibration=[good, batch])
    assert flags(tiny) == before and not any(m._forward_pre_hooks for m in tiny.modules())
