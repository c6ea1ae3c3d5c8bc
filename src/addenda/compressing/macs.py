"""How many multiplications a model's convolutions and linear layers take for one example.

They are counted from the sizes that pass through the layers in one run: a convolution multiplies the c/g · kh · kw
numbers of a filter once for each number that it writes, a transposed one the n/g · kh · kw of a channel for each that
it reads, a linear layer its n inputs for each output. Products of activations (attention), norms and additions are not
counted, nor are layers whose parent reads their weight without calling them.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.wrappers import model_in
from addenda.core.site.kinds import CONV, CONV1D, LINEAR, kind_of

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Call:
    """One call of a layer: places (height, width, …) that it reads and writes, `times` for every example.

    A linear layer has one place for each row.
    """

    inside: tuple[int, ...]
    outside: tuple[int, ...]
    times: float = 1.0

    @property
    def read(self) -> float:
        return prod(self.inside) * self.times

    @property
    def written(self) -> float:
        return prod(self.outside) * self.times


def macs(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, int]:
    """Return {path: multiplications for one example} of every convolution and linear layer; their sum is the model's.

    inputs, named: what the model is called with, one batch, whose size is the first dimension of its first tensor. It
    runs once, in evaluation mode; the model is as before. Raises AddendaError where no tensor is given.
    """
    model_in(model)
    layers = dict(model.named_modules())
    by_path = calls(model, *inputs, **named)
    return {
        path: round(sum(of_call(layers[path], call) for call in layer_calls)) for path, layer_calls in by_path.items()
    }


def calls(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, list[Call]]:
    """Return {path: its calls} of every convolution and linear layer, those that are never called included."""
    batch = next((x.shape[0] for x in (*inputs, *named.values()) if isinstance(x, Tensor) and x.dim()), None)
    if not batch:
        raise AddendaError(
            "Multiplications are counted by running the model on an example, and none was given: pass what the "
            "model is called with, for instance one batch of images."
        )
    by_path: dict[str, list[Call]] = {}
    hooks = []

    def look(path: str, module: nn.Module) -> None:
        def hook(_, args, named, output):
            by_path[path].append(_call(module, args[0] if args else next(iter(named.values())), output, batch))

        by_path[path] = []
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    try:
        for path, module in model.named_modules():
            if kind_of(module) in (LINEAR, CONV, CONV1D) or isinstance(module, _TRANSPOSED):
                look(path, module)
        with torch.no_grad(), training_mode(model, False):
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return by_path


def _call(module: nn.Module, x: Tensor, y: Tensor, batch: int) -> Call:
    if kind_of(module) in (LINEAR, CONV1D):
        rows = x.numel() // max(x.shape[-1], 1)
        return Call((1,), (1,), rows / batch)
    space = len(module.kernel_size)  # type: ignore[arg-type]
    examples = y.shape[0] if y.dim() == space + 2 else 1  # or without a batch dimension
    return Call(tuple(x.shape[-space:]), tuple(y.shape[-space:]), examples / batch)


def of_call(module: Any, call: Call) -> float:
    """Return the multiplications of one call for one example."""
    return module.weight.numel() * (call.read if isinstance(module, _TRANSPOSED) else call.written)
