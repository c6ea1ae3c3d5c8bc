"""Frozen statistics: batch norms and their kind keep their running values while the base is frozen.

Batch norms and their kind (instance norms that track statistics, synchronised ones, subclasses of other libraries) move
their running mean and variance in every forward in training mode, and spectral norms the vectors of their power
iteration. While a base is frozen such a module works as in evaluation, whatever mode it is told: with the statistics
that a saved adapter will meet again. Its weight and bias may be trained all the same.

It is held by a class derived in place, as an adapted module is (`core.forward.adapted`): `train` and `eval` still set
its flag, which acts again when it is let go.
"""

import copyreg
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from addenda.core.modules.classes import original_class, set_original_class
from addenda.core.modules.ours import is_ours

_GATHERED = ("running_mean", "running_var", "num_batches_tracked")


class Held:
    """The class mixed in before a module's own that holds it in evaluation mode, so that its statistics stay."""

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, flag: bool) -> None:
        self.__dict__["training"] = flag


class _HeldType(type):
    """The type of held classes: they are made when needed, so a pickle names the class that each is made from."""


@cache
def _held(original: type) -> type:
    return _HeldType(
        f"Held{original.__name__}", (Held, original), {"__module__": __name__, "__doc__": original.__doc__}
    )


copyreg.pickle(_HeldType, lambda cls: (_held, (cls.__mro__[2],)))


def gathers(module: nn.Module) -> bool:
    """Return whether the module changes tensors of its own in a forward in training mode."""
    if any(module._buffers.get(name) is not None for name in _GATHERED) or isinstance(module, _SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def hold(model: nn.Module) -> list[nn.Module]:
    """Stop the model's modules from gathering statistics, until `let_go`; returns those that were not held before."""
    gatherers = [module for module in model.modules() if gathers(module) and not isinstance(module, Held)]
    for module in gatherers:
        set_original_class(module, _held(original_class(module)))
    return gatherers


def let_go(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Give the held ones among these modules their own class back, and return them."""
    holders: list[nn.Module] = [module for module in modules if isinstance(module, Held)]
    for module in holders:
        set_original_class(module, original_class(module).__mro__[2])
    return holders


@contextmanager
def holding(model: nn.Module) -> Iterator[None]:
    """Hold the statistics for the length of a `with` block; what is held already stays so."""
    modules = hold(model)
    try:
        yield
    finally:
        let_go(modules)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Hold no statistics for the length of a `with` block, so that new ones can be gathered."""
    modules = let_go(model.modules())
    try:
        yield
    finally:
        for module in modules:
            set_original_class(module, _held(original_class(module)))


def mode_of(module: nn.Module) -> bool:
    """Return the flag that `train` and `eval` have set, whether it acts or not."""
    return module.__dict__["training"]


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own buffers that are part of its state dict, by path."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if not is_ours(path)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
