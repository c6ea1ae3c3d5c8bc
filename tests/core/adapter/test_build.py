"""What a fresh adapter would hold, made without values; and files at the sizes and options that people use."""

import copy
import dataclasses
import itertools
import typing
from typing import Literal

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.adapter import build as module
from addenda.core.adapter.build import pool_template, template
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.method.catalogue import info
from addenda.core.method.contract import Method
from addenda.core.site.site import site_at
from shared import EVERY, HIDDEN, NAMES, relative, same_bits, stir


class Holder(nn.Module):
    """A raw parameter, or a stack of them."""

    def __init__(self, *shape: int):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape) * 0.1)

    def forward(self, x):
        return x @ self.matrix.transpose(-1, -2)


LAYERS = {
    "64 × 64": (lambda: nn.Linear(64, 64), (3, 64)),
    "96 × 64": (lambda: nn.Linear(64, 96), (3, 64)),
    "64 × 96": (lambda: nn.Linear(96, 64, bias=False), (2, 5, 96)),
    "conv2d": (lambda: nn.Conv2d(64, 64, 2), (2, 64, 4, 4)),
    "grouped conv1d": (lambda: nn.Conv1d(128, 64, 4, groups=2), (2, 128, 6)),
    "embedding": (lambda: nn.Embedding(128, 64), None),
    "parameter": (lambda: Holder(64, 64), (3, 64)),
    "stack": (lambda: Holder(2, 64, 128), (2, 3, 128)),
}


def layer(kind: str) -> tuple[nn.ModuleDict, torch.Tensor, str]:
    make, shape = LAYERS[kind]
    x = torch.arange(7) if shape is None else torch.randn(shape)
    return nn.ModuleDict({"layer": make()}), x, "layer.matrix" if kind in ("parameter", "stack") else "layer"


def put_on(model: nn.ModuleDict, method: Method, x: torch.Tensor, path: str) -> ad.Adapter:
    """Attached and moved; AddendaError where the method does not take the layer."""
    data = {"calibration": [x], "loss": lambda m, x: m["layer"](x).square().sum()} if method.calibration else {}
    return stir(ad.attach(model, method, targets=path, **data))


def choices(name: str) -> list[Method]:
    """The method at its default options, with each value of each option that has few, and in few bits."""
    entry = info(name)
    hints, found = typing.get_type_hints(entry.cls), [entry.build()]
    for f in dataclasses.fields(entry.cls):
        hint = hints[f.name]
        values = typing.get_args(hint) if typing.get_origin(hint) is Literal else (True, False) if hint is bool else ()
        for value in (*values, *((2,) if f.name == "bits" else ())):
            try:
                found.append(entry.build(**{f.name: value}))
            except AddendaError:
                continue
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_attached_at_default_options_loads_again(name, tmp_path):
    """On 64 and more, with every choice: saved, loaded into an equal base, the same outputs."""
    taken = 0
    for kind, method in itertools.product(LAYERS, choices(name)):
        torch.manual_seed(0)
        model, x, path = layer(kind)
        other = copy.deepcopy(model)
        try:
            adapter = put_on(model, method, x, path)
        except AddendaError:
            continue
        file = adapter.save(tmp_path / "a.safetensors")
        loaded = ad.load(other, file)
        if method.bits is None:
            assert same_bits(adapter.state_dict(), loaded.state_dict()), (kind, method)
        assert relative(other["layer"](x), model["layer"](x)) < 1e-5, (kind, method)
        taken += 1
    assert taken


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_attached_to_a_transformer_at_default_options_loads_again(name, tmp_path):
    for method in choices(name):
        model = toys.make_llama(hidden_size=64, intermediate_size=96)
        other = copy.deepcopy(model)
        ids = torch.arange(40).reshape(2, 20) % toys.VOCAB
        try:
            adapter = stir(ad.attach(model, method))
        except AddendaError:  # bits, where only vectors are trained
            assert method.bits is not None
            continue
        file = adapter.save(tmp_path / "a.safetensors")
        ad.load(other, file)
        assert relative(other(ids).logits, model(ids).logits) < 1e-5, method


@pytest.mark.parametrize("name", EVERY)
def test_a_template_is_what_attach_makes_and_looks_at_no_value(name, monkeypatch):
    monkeypatch.setattr(module, "build_tensors", None)  # the way of methods that look at values
    for kind, method in itertools.product(LAYERS, choices(name)):
        model, x, path = layer(kind)
        try:
            adapter = put_on(model, method, x, path)
        except AddendaError:
            continue
        ((path, held),) = adapter.sites()
        ad.detach(model)
        made = template(site_at(model, path), method)
        for mine, real in ((made._parameters, held._parameters), (made._buffers, {k: held._buffers[k] for k in
                           held.frozen})):  # fmt: skip
            assert [(k, t.shape) for k, t in mine.items()] == [(k, t.shape) for k, t in real.items()]
            assert all(t.is_meta and t.dtype == real[k].dtype for k, t in mine.items())
        assert made.matrices == held.matrices
        assert (made.frozen, made.stacked) == (held.frozen, held.stacked)
        if method.has("pool"):
            shapes = [site_at(model, path).shape]
            found = {k: t.shape for k, t in pool_template(method, shapes).items()}
            assert found == {k: t.shape for k, t in held.pool.stored().items()}


@dataclasses.dataclass(frozen=True)
class Looks(ad.LoRA):
    """One that reads values in `init`, and refuses a weight of low rank as MiLoRA's `derive` does."""

    name = "looks"

    def derive(self, W, rng):
        if torch.linalg.matrix_rank(W) < min(W.shape):
            raise AddendaError("a weight of low rank")
        return {"largest": W.abs().amax()}

    def init(self, W, rng, p):
        own = super().init(W, rng, p)
        return own | {"least": torch.full((int(p["largest"] > 0),), float(W.cpu().abs().min()))}


def test_a_method_that_looks_at_values_sees_the_sites_own():
    model = nn.ModuleDict({"layer": nn.Linear(64, 64)})
    made = template(site_at(model, "layer"), Looks())
    assert made._buffers["least"].shape == (1,)
    assert made._parameters["A"].shape == (8, 64)


def test_plan_in_few_bits_counts_what_a_file_holds(tmp_path):
    """Of methods that refuse made-up weights, and of pools, which are counted once."""
    for spec in ("milora:rank=8,bits=2", "vb-lora:bits=2", "lora:bits=1"):
        model = nn.ModuleDict({"one": nn.Linear(64, 64), "two": nn.Linear(64, 64)})
        planned = ad.plan(model, spec).file_bytes
        adapter = ad.attach(model, spec)
        _, tensors = read(adapter.save(tmp_path / "a.safetensors"))
        assert planned == sum(t.numel() * t.element_size() for t in tensors.values()), spec
