"""What acts at one parameter of a module in the place of a plain list of adapters."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from addenda.core.site.kinds import Kind


@dataclass(frozen=True, eq=False)
class Mixed:
    """What acts at one parameter in the place of a plain list: other adapters for other parts of the input."""

    tensors: tuple  # of SiteTensors: all that may act

    def layer(self, module: nn.Module, original: type, kind: Kind, x: Tensor, *rest, **options) -> Tensor:
        """The output of a module whose weight is changed."""
        raise NotImplementedError

    def act(self, one: Callable, v: Tensor, back: bool = False) -> Tensor:
        """The changed activation; one(tensors, v, cut): see `core.forward.hidden.run`. back: undo, the last first."""
        raise NotImplementedError
