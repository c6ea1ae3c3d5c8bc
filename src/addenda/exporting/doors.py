"""The doors: which other programs' formats there are, and how each method passes each of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.method.contract import Method, WeightMethod
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.pairs import Pair, is_low_rank
from addenda.exporting.routes import Route

Pairs = dict[str, Pair]


@dataclass(frozen=True)
class Door:
    """A format of another program. writes(adapter, place, pairs, options) makes it; reads(path, model) gives it back.

    own: whether methods other than LoRA have forms of their own there; else every change goes as B A. folder: whether
    it is a folder, not a file.
    """

    name: str
    title: str
    module: str  # under addenda.exporting
    own: bool = False
    folder: bool = True
    options: tuple[str, ...] = ()

    def route(self, method: Method, site: Site) -> Route:
        """Return how a method passes at a site."""
        if isinstance(method, HiddenMethod):
            return Route("refused", "it changes activations, which no weight can hold; keep it attached")
        return self._call("route")(method, site)

    def write(self, adapter: Adapter, place: Path, pairs: Pairs | None, **options: Any) -> None:
        """Write the adapter into an empty folder, or to a file that is not there. pairs: every change as B A."""
        self._call("write")(adapter, place, pairs, **options)

    def read(self, path: Path, model: nn.Module) -> Forms:
        """Return what a folder or file holds, as methods and tensors at the sites of a model."""
        return self._call("read")(path, model)

    def describe(self, path: Path) -> str:
        """Return what a file holds, for people."""
        return self._call("describe")(path)

    def _call(self, name: str) -> Callable:
        return getattr(import_module(f"addenda.exporting.{self.module}"), name)


DOORS = {door.name: door for door in (Door("peft", "Hugging Face PEFT 0.21.2", "peft.door", own=True),)}


def door_called(name: str) -> Door:
    """Return a door by its name. Raises AddendaError for an unknown one."""
    if name not in DOORS:
        raise AddendaError(f"There is no door {name!r}.{nearest(name, DOORS)} Known: {', '.join(DOORS)}.")
    return DOORS[name]


def as_product(method: Method, site: Site, what: str = "LoRA") -> Route:
    """Return the route of a change that goes as B A: exact where the method has it so."""
    if isinstance(method, WeightMethod) and len(site.weight.shape) < 2:
        return Route("refused", "a vector is no product of two matrices; use 'merged'")
    if is_low_rank(method):
        return Route("exact", f"{what} of its rank")
    return Route("approximate", f"{what} of the rank= or energy= asked for, with its error")


def routes(door: Door, assigned: Iterable[tuple[Site, Method]]) -> dict[str, Route]:
    """Return how each of these sites passes a door, by path."""
    return {site.path: door.route(method, site) for site, method in assigned}
