"""Frozen is frozen: what a base gathers about its inputs while it runs in training mode stays as it was.

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
    """Mixed in before the module's own class."""

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, flag: bool) -> None:
        self.__dict__["training"] = flag


class _HeldType(type):
    """The type of held classes: they are made when needed, so a pickle says what they are made of."""


@cache
def _held(original: type) -> type:
    return _HeldType(
        f"Held{original.__name__}", (Held, original), {"__module__": __name__, "__doc__": original.__doc__}
    )


copyreg.pickle(_HeldType, lambda cls: (_held, (cls.__mro__[2],)))


def gathers(module: nn.Module) -> bool:
    """Whether the module changes tensors of its own in a forward in training mode."""
    if any(module._buffers.get(name) is not None for name in _GATHERED) or isinstance(module, _SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def hold(model: nn.Module) -> list[nn.Module]:
    """Keep what the model's modules would gather as it is, until `let_go`; returns those that were not held before."""
    found = [module for module in model.modules() if gathers(module) and not isinstance(module, Held)]
    for module in found:
        set_original_class(module, _held(original_class(module)))
    return found


def let_go(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Give those of the modules that are held their own class back; returns them."""
    found: list[nn.Module] = [module for module in modules if isinstance(module, Held)]
    for module in found:
        set_original_class(module, original_class(module).__mro__[2])
    return found


@contextmanager
def holding(model: nn.Module) -> Iterator[None]:
    """Held for the length of a `with` block; what is held already stays so."""
    found = hold(model)
    try:
        yield
    finally:
        let_go(found)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """For the length of a `with` block nothing is held: for those who want other statistics."""
    found = let_go(model.modules())
    try:
        yield
    finally:
        for module in found:
            set_original_class(module, _held(original_class(module)))


def mode_of(module: nn.Module) -> bool:
    """The flag that `train` and `eval` have set, whether it acts or not."""
    return module.__dict__["training"]


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The base's own buffers that are part of its state dict, by path."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if not is_ours(path)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
