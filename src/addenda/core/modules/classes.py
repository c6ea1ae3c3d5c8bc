"""A module's own class, which stays known after another one was derived from it in place."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Adapted:
    """The class mixed in before a module's own by `core.forward.adapted`, which derives one in place."""

    _addenda_properties: tuple[str, ...]  # the names of raw parameters that are read through a property
    _addenda_derive: Callable[[type, tuple[str, ...]], type]  # (original, properties): the derived class


def original_class(module: nn.Module) -> type:
    """Return the module's own class, whether it is adapted or not."""
    return type(module).__mro__[2] if isinstance(module, Adapted) else type(module)  # Derived, Adapted, original, …


def set_original_class(module: nn.Module, cls: type) -> None:
    """Give the module another class of its own; if it is adapted it stays so."""
    derived: Any = type(module)
    module.__class__ = derived._addenda_derive(cls, derived._addenda_properties) if isinstance(module, Adapted) else cls
