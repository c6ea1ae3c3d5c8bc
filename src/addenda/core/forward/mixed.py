"""The base class of compositions: what acts at one parameter in the place of a plain list of adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from addenda.core.site.kinds import Kind


@dataclass(frozen=True, eq=False)
class Mixed:
    """A composition at one parameter, in the place of a plain list: other adapters for other parts of the input."""

    tensors: tuple  # of SiteTensors: all that may act

    def layer(self, module: nn.Module, original: type, kind: Kind, x: Tensor, *rest, **options) -> Tensor:
        """Return the output of a module whose weight is changed."""
        raise NotImplementedError

    def act(self, one: Callable, v: Tensor, back: bool = False) -> Tensor:
        """Return the changed activation. one: an adapter's change, as in `core.forward.hidden.run`; back: undo."""
        raise NotImplementedError

    def whole(self, run: Callable, module: nn.Module, mixed: dict, args: tuple, kwargs: dict) -> Any:
        """Return what a module returns of whose raw parameters there is one to choose for each part of its input.

        mixed: such objects by parameter, of its weight too; run(tensors by parameter, x, rest, options): its forward
        with these.
        """
        raise NotImplementedError
