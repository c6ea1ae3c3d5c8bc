"""Layers that another library has quantised, read as linear layers with a packed weight.

    adopt(model)              # bitsandbytes' and hqq's linear layers become nn.Linear; their bytes stay where they are
    ad.attach(model, "lora")  # as on any packed weight: files fingerprint the bytes, merge and unmerge are exact
    release(model)            # the library's own modules again, for what only they can do: saving in its format, say

There is one file for each library, of its name, which alone imports it, and only when a module of that library is met.
It has `read(module, dtype)`: a packed weight over the module's own tensors, or None where it keeps no weight that it
knows; dtype is that of the model's values, for forms that note none.
While adopted, a layer's product is that of its values; the library's own kernels are not used.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.modules.put import put
from addenda.core.packed.tensor import Packed
from addenda.core.state.state import find_state
from addenda.core.state.undo import undone

_KEPT = "_addenda_adopted"  # on the layer that stands in: the library's module


@checked()
def adopt(model: nn.Module) -> list[str]:
    """Put a Linear in the place of every layer that a library has quantised; return the paths. Nothing is copied.

    Raises AddendaError, with nothing replaced, where such a layer has a forward of its own on the instance, or is kept
    in a way that cannot be read.
    """
    layers: dict[str, nn.Linear] = {}
    dtype = _dtype(model)
    for path, module in model.named_modules():
        try:
            packed = read(module, dtype)
        except AddendaError as error:
            raise AddendaError(f"{path}: {error}") from None
        if packed is None:
            continue
        if "forward" in module.__dict__ or not path:
            why = "its forward was replaced on the instance (by accelerate's hooks?)" if path else "it is the model"
            raise AddendaError(f"{path or type(module).__name__} cannot be adopted: {why}.")
        layers[path] = _linear(module, packed)
    with undone(model):
        for path, layer in layers.items():
            put(model, path, layer)
    return list(layers)


@checked()
def release(model: nn.Module) -> list[str]:
    """Put the library's own modules in their places again; return the paths. A weight that was made plain stays plain.

    Raises AddendaError while an adapter is attached.
    """
    if find_state(model) is not None:
        raise AddendaError("An adapter is attached to the layers that stand in. Call detach(model) first.")
    layers = {p: m for p, m in model.named_modules() if _KEPT in m.__dict__ and isinstance(m.weight, Packed)}
    with undone(model):
        for path, layer in layers.items():
            put(model, path, layer.__dict__[_KEPT])
    return list(layers)


def read(module: nn.Module, dtype: torch.dtype = torch.float32) -> Packed | None:
    """Return the packed weight of a library's quantised layer, over its own tensors; None for any other module.

    dtype: of its values, where the layer itself does not say.
    """
    bridge = _bridge(type(module))
    return None if bridge is None else bridge.read(module, dtype)


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model computes in: of its embedding, else its first plain parameter, else its config."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    plain = (p.dtype for p in [*embeddings, *model.parameters()] if p.is_floating_point() and not isinstance(p, Packed))
    declared = getattr(getattr(model, "config", None), "dtype", None)
    return next(plain, declared if isinstance(declared, torch.dtype) else torch.float32)


@cache
def _bridge(cls: type) -> Any:
    """Return the file for the library that a class, or one that it is derived from, belongs to."""
    for base in cls.__mro__:
        name = base.__module__.partition(".")[0]
        if name not in ("torch", "builtins", "transformers", "addenda") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
    return None


def _linear(module: Any, packed: Packed) -> nn.Linear:
    """Return a Linear with this weight and the module's own bias."""
    m, n = packed.shape
    layer = nn.Linear(n, m, bias=False, device="meta")
    layer._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
    if (bias := module.bias) is not None:
        layer._parameters["bias"] = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    layer.__dict__[_KEPT] = module
    return layer.train(module.training)


def table(t: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor, or an empty one where a form has none."""
    return torch.empty(0) if t is None else t
