"""The capabilities of a method, found out by running it on small layers rather than declared."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from addenda.core.adapter.attach import attach, detach
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.forward.adapted import effective_weight
from addenda.core.merge.merge import merge
from addenda.core.method.contract import Method, WeightMethod
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.kinds import PARAMETER
from addenda.core.site.site import site_at
from addenda.core.state.state import find_state, tensors_at

SIZE = 64  # of the layers; every default option of the catalogue fits it


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a method, each True only if it was tried and the numbers agreed to 1e-4."""

    linear: bool  # Linear: the adapted output is that of W + ΔW
    conv: bool
    embedding: bool
    parameter: bool  # a raw matrix, read as an attribute
    stacked: bool  # stacked matrices: fused experts
    low_rank: bool  # its factors multiply to ΔW
    sparse: bool  # its positions and values make ΔW
    mergeable: bool  # merged, the same output without the adapter
    exact_start: bool  # output before the first step equal to the base's, bit for bit
    hidden: bool = False  # what a module returns is changed as `change` says

    def __str__(self) -> str:
        return ", ".join(f.name.replace("_", " ") for f in fields(self) if getattr(self, f.name)) or "nothing"


class _Holder(nn.Module):
    """A module that reads a raw parameter as an attribute: one product for each matrix in it."""

    def __init__(self, *shape: int):
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.transpose(-1, -2)


@torch.no_grad()
def probe(method: Method) -> Capabilities:
    """Try a method on a layer of every kind (float32, CPU, one to three dozen milliseconds)."""
    if isinstance(method, HiddenMethod):
        return _hidden(method)
    assert isinstance(method, WeightMethod)
    rows = Stream(0, "probe").normal(5, SIZE)
    image = Stream(0, "probe").normal(2, SIZE, 4, 4)
    layers = {
        "linear": (nn.Linear(SIZE, SIZE), rows),
        "conv": (nn.Conv2d(SIZE, SIZE, 2), image),
        "embedding": (nn.Embedding(SIZE, SIZE), torch.arange(5)),
        "parameter": (_Holder(SIZE, SIZE), rows),
        "stacked": (_Holder(2, SIZE, SIZE), rows.expand(2, 5, SIZE)),
    }
    works, linear = {}, {}
    for name, (layer, x) in layers.items():
        for p in layer.parameters():
            p.copy_(Stream(0, name).normal(*p.shape, std=SIZE**-0.5))
        model, path = (
            nn.ModuleDict({"layer": layer}),
            "layer" if name in ("linear", "conv", "embedding") else "layer.matrix",
        )
        results = _try(model, path, method, x)
        works[name] = results.pop("agrees")
        linear = results if name == "linear" else linear
    return Capabilities(**works, **linear)


def _hidden(method: HiddenMethod) -> Capabilities:
    """Try a hidden method on the output of one Linear."""
    x, layer = Stream(0, "probe").normal(2, 20, SIZE), nn.Linear(SIZE, SIZE)
    for p in layer.parameters():
        p.copy_(Stream(0, "linear").normal(*p.shape, std=SIZE**-0.5))
    model = nn.ModuleDict({"layer": layer}).eval()
    base = layer(x)
    with torch.enable_grad():
        adapter = attach(model, method, targets="layer")
    exact = torch.equal(layer(x), base)
    ((path, tensors),) = adapter.sites()
    for key, p in tensors._parameters.items():
        assert p is not None
        p.add_(Stream(1, key).normal(*p.shape, std=0.02))
    y = layer(x)
    expected = method.change(x if path.endswith("@input") else base, base, tensors.tensors())
    agrees = _near(y, expected) and not _near(y, base)
    blank = dict.fromkeys((f.name for f in fields(Capabilities)), False)
    return Capabilities(**blank | {"exact_start": exact, "hidden": agrees})


def _try(model: nn.ModuleDict, path: str, method: WeightMethod, x: Tensor) -> dict[str, bool]:
    """Try a method on one layer: whether its output is that of the effective weight, and what its faster forms give."""
    failure: dict[str, bool] = dict.fromkeys(("agrees", "low_rank", "sparse", "mergeable", "exact_start"), False)
    layer = model["layer"]
    base = layer(x)
    batches = [{"x": x}] if method.calibration else None
    try:
        with torch.enable_grad():
            attach(model, method, targets=path, calibration=batches, loss=lambda *_: layer(x).square().sum())
        exact = torch.equal(layer(x), base)
        model.eval()  # without the values that schedules draw for training
        site, tensors = site_at(model, path), tensors_at(model, "default", path)
        for key, p in tensors.named_parameters():
            p.add_(Stream(1, key).normal(*p.shape, std=0.02))
        y, weight = layer(x), effective_weight(site, (tensors,))
        agrees = _near(y, _with(layer, site, weight, x)) and not _near(y, base)
        report = {"agrees": agrees, "exact_start": exact, "low_rank": False, "sparse": False}
        if weight.dim() == 2 and site.kind != PARAMETER:
            change = site.kind.to_matrix(weight - site.weight)
            if method.has("factors"):
                B, A = method.factors(tensors.tensors(), site.shape).pair()
                report["low_rank"] = _near(B @ A, change)
            if method.has("sparse"):
                index, values = method.sparse(tensors.tensors(), site.shape)
                report["sparse"] = _near(torch.zeros(change.numel()).index_put((index,), values), change.flatten())
        merge(model)
        report["mergeable"] = _near(layer(x), y)
        return report
    except AddendaError:
        return failure
    finally:
        if find_state(model) is not None:
            detach(model)


def _with(layer: nn.Module, site, weight: Tensor, x: Tensor) -> Tensor:
    """Return the layer's own output with another weight."""
    stored, slots = site.weight.data, site.module._modules["addenda"]
    live, slots.live = slots.live, dict.fromkeys(slots.live, ())
    try:
        site.weight.data = weight
        return layer(x)
    finally:
        site.weight.data, slots.live = stored, live


def _near(a: Tensor, b: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= 1e-4 * torch.linalg.vector_norm(b).clamp_min(1e-12))
