"""The base class of compositions: what acts at one parameter in the place of a plain list of adapters."""

from collections.abc import Callable
from dataclasses import dataclass

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
