"""The `with` blocks in which other adapters act than outside: none, one for each example, or for each group of rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from weakref import finalize, ref

import torch
from torch import nn

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.forward.acting import Block, inside, lock
from addenda.core.forward.grouped import Grouped, Groups
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.per_example import PerExample
from addenda.core.forward.tensors import SiteTensors
from addenda.core.modules.late_backward import checkpointed, checkpoints, tell, used
from addenda.core.site.kinds import PARAMETER
from addenda.core.site.site import owners_of, site_at
from addenda.core.state.state import Arrangement, apply_block, intact, mirror, record_of, state_of, sweep


@checked()
def disabled(model: nn.Module) -> AbstractContextManager:
    """Let the base alone act for the length of a `with` block; afterwards what acted before acts again.

    For the calling thread or task alone, as `per_example`: see there. Raises AddendaError for a merged change.
    """

    def mix(held: list[SiteTensors | None]) -> Mixed:
        raise AssertionError("no adapter is named")

    return arranged(model, (), mix, ())


@contextmanager
def arranged(
    model: nn.Module,
    names: Sequence[str],
    mix: Callable[[list[SiteTensors | None]], Mixed | tuple[SiteTensors, ...]],
    in_turn: Sequence[str] | None = None,
    raw: bool = False,
) -> Iterator[Callable[[], bool]]:
    """Let `mix` of the named adapters' tensors act at every site, for the length of a `with` block.

    mix is given one entry for each name, None where that adapter has nothing; it is not asked where none has. Where it
    gives a tuple, these act one after another. in_turn: the adapters that act at raw parameters, which see no batch;
    None where that makes no sense. raw: `mix` acts there too. Afterwards what acted before acts again, another
    arrangement too. Gives a function that tells whether this acts now, and no block inside. It acts for the calling
    context alone (`core.forward.acting`). What backward computes again uses it, behind the end too.

    Raises AddendaError for an unknown name, a merged change, and adapters of raw parameters without in_turn.
    """
    root, state = state_of(model)
    for n in names:
        intact(root, n, record_of(root, n).record)
    if state.merged is not None:
        raise AddendaError(f"{', '.join(state.active)} is merged into the base. Call unmerge(model) first.")
    owners = owners_of(root)
    every = dict.fromkeys(p for n in names for p in state.records[n].methods)
    for path in every if in_turn is None and not raw else ():
        site = site_at(root, path, owners)
        if site.kind == PARAMETER or site.ties:
            reason = "is a raw parameter" if site.kind == PARAMETER else "is shared by several modules"
            raise AddendaError(f"{path} {reason}, and sees no batch to choose an adapter for each example of.")
    arrangement = Arrangement(names=tuple(names), mix=mix, in_turn=None if raw else tuple(in_turn or ()))
    modules = checkpointed(root)

    def acts() -> bool:
        if torch.compiler.is_compiling():
            return state.here.block is arrangement
        return used(arrangement, lambda: state.arrangement is arrangement)

    def mark(module: nn.Module, args: tuple, out: object) -> None:
        if checkpoints(modules) and state.arrangement is arrangement:
            tell(out, Block, arrangement)

    with lock:
        apply_block(root, state, arrangement)
    finalize(arrangement, sweep, ref(root)).atexit = False
    flagged = any(m.gradient_checkpointing is True for m in modules)
    handle = root.register_forward_hook(mark) if flagged else None
    try:
        with inside(arrangement):
            mirror(root, state)
            yield acts
    finally:
        if handle is not None:
            handle.remove()
        mirror(root, state)


def grouped(model: nn.Module, names: Sequence[str], groups: Groups) -> AbstractContextManager:
    """Pass each group of a batch's rows in a `with` block through an adapter of its own; names: of slots 0, 1, ….

    What the rows are, `groups` says: set it before every forward. For raw parameters too, whose modules then run once
    for each group. Raises AddendaError for an unknown name and a merged change.
    """

    def mix(held: list[SiteTensors | None]) -> Mixed:
        return Grouped(tuple(t for t in held if t is not None), tuple(held), groups)

    return arranged(model, names, mix, raw=True)


@checked()
def per_example(model: nn.Module, names: Sequence[str | None]) -> AbstractContextManager:
    """Pass example i of every batch in a `with` block through the adapter names[i]; None: the base.

    The first dimension of every adapted layer's input must be the batch. Low-rank adapters share one base product;
    for others the batch is split by adapter. Gradients reach the adapters that are named. Afterwards what acted before
    acts again. The block is the calling thread's or asyncio task's own: another thread, one that was started in here
    too, sees the model's state, unless it runs in `contextvars.copy_context()`.

    Raises AddendaError for an unknown name, a merged change, and adapters of raw parameters, which see no batch.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise AddendaError(f"per_example takes a list of names, one for each example of the batch, got {names!r}.")
    adapters = tuple(dict.fromkeys(n for n in names if n is not None))
    indices = torch.tensor([-1 if n is None else adapters.index(n) for n in names])

    def mix(held: list[SiteTensors | None]) -> Mixed:
        present = [t for t in held if t is not None]
        place = torch.tensor([-1 if t is None else present.index(t) for t in [None, *held]])  # -1: the base
        return PerExample(tuple(present), place[indices + 1])

    return arranged(model, adapters, mix)
