"""The doors: which other programs' formats there are, and how each method passes each of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any

from torch import nn

from addenda.core.adapter.assign import Spec, assign
from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.merge.outputs import Outputs
from addenda.core.method.contract import Method
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.wrappers import model_in
from addenda.core.site.site import Site
from addenda.core.site.targets import Target, grouped
from addenda.core.state.vocabulary import grown_of
from addenda.exporting.install import Forms
from addenda.exporting.pairs import Pair
from addenda.exporting.routes import Route

Pairs = dict[str, Pair]


@dataclass(frozen=True)
class Door:
    """A format of another program. writes(adapter, place, pairs, options) makes it; reads(path, model) gives it back.

    own: whether methods other than LoRA have forms of their own there; else every change goes as B A. activations:
    whether some that change activations have. folder: whether it is a folder, not a file. model: whether a whole model
    is written, which is loaded to prove it.
    """

    name: str
    title: str
    module: str  # under addenda.exporting
    own: bool = False
    activations: bool = False
    folder: bool = True
    model: bool = False
    options: tuple[str, ...] = ()

    def route(self, method: Method, site: Site, config: Any = None) -> Route:
        """Return how a method passes at a site. config: of a transformers model, where a door looks at it."""
        if isinstance(method, HiddenMethod) and not self.activations:
            return Route("refused", "it changes activations, which no weight can hold; keep it attached")
        return self._call("route")(method, site, config)

    def write(self, adapter: Adapter, place: Path, pairs: Pairs | None, **options: Any) -> dict[str, float]:
        """Write the adapter into an empty folder, or to a file that is not there. pairs: every change as B A.

        Returns ‖ΔW − written‖ / ‖ΔW‖ by path where it is rounded to be written.
        """
        return self._call("write")(adapter, place, pairs, **options) or {}

    def read(self, path: Path, model: nn.Module, **options: Any) -> Forms:
        """Return what a folder or file holds, as methods and tensors at the sites of a model."""
        return self._call("read")(path, model, **options)

    def outputs(self, path: Path, like: nn.Module, batch: object) -> Outputs:
        """Return what a whole model that was written gives on a batch. like: the model that it was written from."""
        return self._call("outputs")(path, like, batch)

    def describe(self, path: Path) -> str:
        """Return what a file holds, for people."""
        return self._call("describe")(path)

    def _call(self, name: str) -> Callable:
        return getattr(import_module(f"addenda.exporting.{self.module}"), name)


_ALL = (
    Door("peft", "Hugging Face PEFT 0.21.2", "peft.door", own=True, activations=True),
    Door("vllm", "vLLM 0.32", "vllm", options=("uniform", "max_lora_rank")),
    Door("gguf", "llama.cpp's GGUF", "gguf.door", folder=False, options=("dtype",)),
    Door("kohya", "kohya's sd-scripts", "kohya.door", folder=False, options=("part", "layout", "dtype")),
    Door("merged", "a model's own folder", "merged_model", own=True, model=True, options=("allow_loss",)),
)
DOORS = {door.name: door for door in _ALL}


def door_called(name: str) -> Door:
    """Return a door by its name. Raises AddendaError for an unknown one."""
    if name not in DOORS:
        raise AddendaError(f"There is no door {name!r}.{nearest(name, DOORS)} Known: {', '.join(DOORS)}.")
    return DOORS[name]


@dataclass(frozen=True)
class Passage:
    """How every site of a planned adapter would pass a door, before anything is trained."""

    door: Door
    routes: dict[str, Route]  # by path

    @property
    def refused(self) -> dict[str, Route]:
        """The sites that have no form behind the door."""
        return {path: r for path, r in self.routes.items() if r.kind == "refused"}

    def __str__(self) -> str:
        lines = [f"{self.door.name}: {'would be refused' if self.refused else 'would pass'} ({self.door.title})"]
        by_route: dict[Route, list[str]] = {}
        for path, r in self.routes.items():
            by_route.setdefault(r, []).append(path)
        for r, paths in by_route.items():
            groups = grouped(paths)
            more = f" and {len(groups) - 3} more kinds" if len(groups) > 3 else ""
            lines += wrap(f"{len(paths)} sites {r}", 80, initial_indent="  ", subsequent_indent="  ")
            lines += [f"    {pattern}" for pattern in [*groups][:3]] + ([f"    {more.strip()}"] if more else [])
        return "\n".join(lines)


@checked()
def passage(
    model: nn.Module,
    method: Spec | Mapping[Target, Spec],
    door: str,
    *,
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    also_train: Iterable[Target] = (),
    head_bits: int | None = None,
) -> Passage:
    """Say how an adapter that is not trained yet would pass a door, site by site; nothing is attached.

    The arguments are those of `attach`. Raises AddendaError as it does, and for an unknown door.
    """
    chosen = door_called(door)
    root = model_in(model)
    rows = rows_refused(root, chosen)
    assigned, _ = assign(root, method, targets, exclude, also_train, head_bits)
    routes = {site.path: chosen.route(m, site, getattr(root, "config", None)) for site, m in assigned}
    return Passage(chosen, routes | rows)


def rows_refused(root: nn.Module, door: Door) -> dict[str, Route]:
    """Return by table that a door has no place for the new rows of a vocabulary; empty where it has, or none is new."""
    grown = grown_of(root)
    if grown is None or door.model:
        return {}
    why = (
        "the rows of new tokens are no change of a weight of the base, and an adapter's format holds nothing else; "
        "write the whole model, export(adapter, 'merged', out), and the tokenizer beside it"
    )
    return {table: Route("refused", why) for table in grown.vocabulary.tables}
