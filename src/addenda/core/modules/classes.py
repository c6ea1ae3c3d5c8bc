"""A module's own class, which stays known after another one was derived from it in place."""

from collections.abc import Callable
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError


class Adapted:
    """The class mixed in before a module's own by `core.forward.adapted`, which derives one in place."""

    _addenda_properties: tuple[str, ...]  # the names of raw parameters that are read through a property
    _addenda_derive: Callable[[type, tuple[str, ...]], type]  # (original, properties): the derived class


def original_class(module: nn.Module) -> type:
    """Return the module's own class, whether it is adapted or not."""
    line = type(module).__mro__  # derived, Adapted, original, …; in front of that what was derived since
    return line[line.index(Adapted) + 1] if isinstance(module, Adapted) else line[0]


def refuse_derived(module: nn.Module, path: str = "") -> None:
    """Raise AddendaError where somebody has derived a class from the adapted one, which another class would drop."""
    if isinstance(module, Adapted) and type(module).__mro__[1] is not Adapted:
        where = path or f"A {original_class(module).__name__}"
        raise AddendaError(
            f"{where} has got another class since an adapter was attached, {type(module).__name__}, as a "
            "parametrization gives it. Take that off first (torch.nn.utils.parametrize.remove_parametrizations); to "
            "have both, make it before attach and adapt what it computes the weight from."
        )


def set_original_class(module: nn.Module, cls: type) -> None:
    """Give the module another class of its own; if it is adapted it stays so.

    Raises AddendaError where somebody has derived a class from the adapted one.
    """
    refuse_derived(module)
    derived: Any = type(module)
    module.__class__ = derived._addenda_derive(cls, derived._addenda_properties) if isinstance(module, Adapted) else cls
