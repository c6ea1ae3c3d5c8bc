"""Every method on the meta device, where no tensor has values: one that is made on the CPU in a forward, or read back
to the host, raises there, where it would make a GPU wait or stop it. What a run does there beside its forwards, as
looking for dead tensors, is not asked."""

import dataclasses
import re
from dataclasses import dataclass

import pytest
import torch
from tests.core.site.test_site import Raw
from tests.core.test_contracts import LAYERS, layer_of
from torch import Tensor, nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, WeightMethod
from addenda.core.modules.autocast import autocast_dtype, without_autocast
from addenda.core.site.site import site_at
from shared import EVERY, HIDDEN, METHODS, NAMES, attach, sees_nothing, stir, where

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
TRANSFORMERS = {  # whose own masks read the padding back where attention is sdpa, and BERT's wherever it is given
    "llama": (toys.make_llama, {"input_ids": IDS, "attention_mask": MASK}),
    "gpt2": (toys.make_gpt2, {"input_ids": IDS, "attention_mask": MASK}),
    "bert": (toys.make_bert, {"input_ids": IDS}),
}

every_method = pytest.mark.parametrize("name", EVERY)
every_weight_method = pytest.mark.parametrize("name", NAMES)
every_hidden_method = pytest.mark.parametrize("name", HIDDEN)


def there_and_back(model: nn.Module, *adapters: ad.Adapter, **batch: Tensor) -> None:
    """Forward and backward on the meta device, in training with what schedules draw, and in evaluation."""
    for adapter in adapters:
        adapter.draw(1)
    model.to("meta")
    for training in (True, False):
        model.train(training)
        for adapter in adapters:
            adapter.draw(2)
        given = [t.to("meta") for t in batch.values()]
        y = model(*given) if "x" in batch else model(**dict(zip(batch, given, strict=True)))
        y = getattr(y, "logits", y)
        assert y.is_meta
        y.square().mean().backward()
        for adapter in adapters:
            without = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.is_meta]
            assert not without
        model.zero_grad()


@every_method
def test_every_method_stays_on_its_device(name, tiny):
    there_and_back(tiny, stir(attach(tiny, name, IDS, targets=where(name))), x=IDS)


@every_weight_method
@pytest.mark.parametrize("kind", [k for k in LAYERS if k not in ("strided input", "sparse embedding")])
def test_weight_methods_stay_at_every_kind_of_layer(name, kind):
    """Those that a method refuses are the contract tests' to look at."""
    model, x = layer_of(kind)
    data = x if len(x) else torch.randn(3, 8, dtype=x.dtype)
    if METHODS[name].check(*site_at(model, "0").shape) or sees_nothing(model, name, data, "0"):
        return
    there_and_back(model, stir(attach(model, name, data, targets="0")), x=x)


@every_weight_method
def test_weight_methods_stay_at_raw_parameters(name):
    model, x = Raw(), torch.randn(4, 8)
    if not sees_nothing(model, name, x, ["flat", "stack"]):
        there_and_back(model, stir(attach(model, name, x, targets=["flat", "stack"])), x=x)


@every_weight_method
def test_weight_methods_stay_at_conv1d(name, gpt2):
    adapter = attach(gpt2, name, IDS, targets="*.attn.c_attn")
    there_and_back(gpt2, stir(adapter), input_ids=IDS)


@every_hidden_method
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_hidden_methods_stay_in_transformers(name, kind):
    make, batch = TRANSFORMERS[kind]
    model = make()
    model.set_attn_implementation("eager")
    joined = kind == "gpt2" and name in ("ia3-output", "prefix")  # its keys have no layer of their own
    places = "attention" if joined else None
    there_and_back(model, stir(ad.attach(model, METHODS[name], targets=places)), **batch)


@every_weight_method
def test_few_bits_stay(name, tiny):
    adapter, refusal = None, ""
    try:
        adapter = attach(tiny, dataclasses.replace(METHODS[name], bits=2), IDS, targets="linear")
    except AddendaError as error:  # one without matrices, or whose zeros leave no spread to round by
        refusal = str(error)
    if adapter is None:
        assert "bits" in refusal
        return
    there_and_back(tiny, stir(adapter), x=IDS)


def test_several_at_once_and_heads_stay(tiny):
    one = stir(ad.attach(tiny, METHODS["dylora"], name="one", also_train=["score"]))
    two = stir(ad.attach(tiny, METHODS["shira"], name="two"))
    three = stir(ad.attach(tiny, METHODS["houlsby"], name="three"))
    ad.switch(tiny, ["one", "two", "three"])
    there_and_back(tiny, one, two, three, x=IDS)


# -- what the device tells -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads(WeightMethod):
    """Reads a number back to the host in its forward."""

    def init(self, W, rng, p):
        return {"a": nn.Parameter(torch.ones(1))}

    def delta(self, W, p):
        return W * float(p["a"].detach()) * p["a"]


@dataclass(frozen=True)
class Makes(Reads):
    """Makes a tensor on the CPU in its forward."""

    def delta(self, W, p):
        return W * torch.ones(W.shape) * p["a"]


@pytest.mark.parametrize(("method", "said"), [(Reads(), "meta tensor"), (Makes(), "cpu")])
def test_the_device_tells_what_it_should(method: Method, said, tiny):
    with pytest.raises(Exception, match=rf"(?i){re.escape(said)}"):
        there_and_back(tiny, ad.attach(tiny, method, targets="linear"), x=IDS)


def test_autocast_is_asked_for_devices_that_it_knows():
    assert autocast_dtype("meta") is None
    assert autocast_dtype("cpu") is None
    with without_autocast("meta"):
        assert torch.ones(2, 2, device="meta").mm(torch.ones(2, 2, device="meta")).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16
        assert autocast_dtype("meta") is None
        with without_autocast("cpu"):
            assert autocast_dtype("cpu") is None
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.float32
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16
