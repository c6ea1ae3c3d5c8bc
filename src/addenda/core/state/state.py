"""The record that a model keeps of its adapters: a plain object on the module that was first given to `attach`."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.forward.acting import Acting, Block, alone, blocks, compiled, enter, leave, lock
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.slots import Slots, slots_of
from addenda.core.forward.still import Stills
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import Method
from addenda.core.modules.late_backward import History
from addenda.core.modules.wrappers import model_in, unwrap
from addenda.core.packed.tensor import Packed
from addenda.core.site.site import Point, Site, owners_of, site_at
from addenda.core.state.trained_on import TrainedOn

_MOVED = (
    "A new head or resize_token_embeddings takes its place before attach or load: detach(model) gives everything else "
    "back; then attach again, or load a file."
)


@dataclass
class Record:
    """The plain data of one adapter; its tensors live in the modules."""

    methods: dict[str, Method]  # by path of the site, in the model's order
    also_train: tuple[str, ...]  # the paths among them that are whole copies of heads
    seed: int
    step: int = 0
    seconds: float = 0.0  # how long attaching took
    origins: dict[str, str] = field(default_factory=dict)  # the paths of training by path, where they are others
    left_out: dict[str, str] = field(default_factory=dict)  # paths in its file that this model cannot take, and why
    note: Mapping[str, Any] = field(default_factory=dict)  # of its file, kept for the next one
    trained_on: TrainedOn | None = None  # tokenizer and adapters beside it, where that was noted
    labels: tuple[str, ...] = ()  # the names of a classifier's outputs, in their order, where it was told
    grown: bool = False  # whether the vocabulary had new rows when it was attached, which its file then holds
    start: tuple[int, dict[str, int | Tensor]] = (0, {})  # the step at which it came, and marks of its tensors then
    moved: tuple | None = None  # marks of its tensors since the first step, while nothing has moved them


@dataclass(frozen=True)
class Kept:
    """The base's own values at a site while a change is merged into it: all of them, or those at flat positions."""

    values: Tensor
    index: Tensor | None = None
    adapted: bool = True  # False: a packed weight that no adapter changes and that a merge made plain

    def fits(self, weight: Tensor) -> bool:
        """Return whether these are values of a weight of this shape."""
        if self.index is None:
            return self.values.shape == weight.shape
        return not self.index.numel() or int(self.index.max()) < weight.numel()

    def into(self, site: Site) -> None:
        """Put the values at the site. A packed weight is not written to: a plain one takes its place for a while."""
        if isinstance(site.weight, Packed) or isinstance(self.values, Packed):
            values = self.values.to(site.weight.device)
            site.module._parameters[site.parameter] = (
                values if isinstance(values, nn.Parameter) else nn.Parameter(values, False)
            )
        else:
            self.put_back(site.weight.data)

    def put_back(self, weight: Tensor) -> Tensor:
        """Write the base's own bits into a contiguous `weight` that has the merged ones, and return it.

        The weight may have another dtype by now, or be on another device.
        """
        if self.index is None:
            return weight.copy_(self.values)
        weight.view(-1)[self.index.to(weight.device)] = self.values.to(weight)
        return weight


def _none(held: list[SiteTensors | None]) -> Mixed:
    raise AssertionError("no adapter is named")


@dataclass(eq=False)
class Arrangement(Block):
    """A `with` block in which other adapters act than the active ones; see `core.adapter.blocks`."""

    names: tuple[str, ...] = ()
    mix: Callable[[list[SiteTensors | None]], Mixed | tuple[SiteTensors, ...]] = _none
    in_turn: tuple[str, ...] | None = ()  # at raw parameters; None: `mix` there too


class Within(threading.local):
    """The block of this model that this thread is in, for compiled forwards."""

    def __init__(self):
        self.block: Arrangement | None = None


@dataclass
class State:
    """All adapters of one model, which of them are live, and what detaching gives back."""

    records: dict[str, Record] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    last: tuple[str, ...] = ()  # those that acted before none did
    blocks: WeakSet[Arrangement] = field(default_factory=WeakSet)  # those that somebody is in
    here: Within = field(default_factory=Within)
    history: History = field(default_factory=History)  # of what acted when
    frozen: dict[str, bool] = field(default_factory=dict)  # requires_grad of base parameters before the freeze
    merged: dict[str, Kept] | None = None  # the base's own weights by path while a change is merged into them
    cast: dict[str, Tensor] = field(default_factory=dict)  # what a merge has converted, by path, as it was
    watched: set[tuple] = field(default_factory=set)  # kinds of forwards seen to be right by `core.state.bypass`
    fingerprints: dict[str, tuple] = field(default_factory=dict)  # path -> (identity, hash)
    gathered: dict[str, tuple[int, int]] = field(default_factory=dict)  # buffers at the first step: (identity, version)

    def __getstate__(self) -> dict:
        passing = ("blocks", "here", "history")  # nobody is in a block of a copy
        return {k: v for k, v in self.__dict__.items() if k not in passing} | {"gathered": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self.blocks, self.here, self.history = WeakSet(), Within(), History()

    @property
    def arrangement(self) -> Arrangement | None:
        """The innermost block of this model that the running code is in, or None."""
        open_blocks = [b for b in blocks() if isinstance(b, Arrangement) and b in self.blocks and not b.over()]
        return open_blocks[-1] if open_blocks else None

    def base(self, site: Site) -> Tensor:
        """Return the base's own weight at a site, as stored, also while a change is merged and the model converted."""
        if (own := self.cast.get(site.tensor_path)) is not None:
            return own
        kept = (self.merged or {}).get(site.weight_path)
        if kept is None:
            return site.weight
        return kept.values if kept.index is None else kept.put_back(site.weight.detach().clone())


class Host(NamedTuple):
    """The (sub)module that carries adapters, and its state."""

    root: nn.Module
    state: State


class HostRecord(NamedTuple):
    """The (sub)module that carries an adapter, its state, and the record of this adapter."""

    root: nn.Module
    state: State
    record: Record


def find_state(model: nn.Module) -> Host | None:
    """Return the (sub)module that carries adapters and its state, or None when nothing is attached.

    Raises AddendaError when several parts of the model carry adapters of their own.
    """
    parts = model_in(model).modules()
    hosts = [Host(module, module.__dict__["_addenda"]) for module in parts if "_addenda" in module.__dict__]
    if len(hosts) > 1:
        raise AddendaError(
            f"{len(hosts)} parts of this {type(unwrap(model)).__name__} carry adapters of their own "
            f"({', '.join(type(m).__name__ for m, _ in hosts)}). Call with the part that you mean."
        )
    return hosts[0] if hosts else None


def names_on(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, in the order in which they came; empty where it has none."""
    host = find_state(model)
    return () if host is None else tuple(host.state.records)


def name_of(file: Path, otherwise: str) -> str:
    """Return a name that an adapter of a file may have, after the file; otherwise: where nothing of that is left."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", file.stem).strip("-")[:56] or otherwise


def free_name(model: nn.Module, name: str) -> str:
    """Return a name that no adapter of the model has: this one, or this one with a number behind it."""
    there = names_on(model)
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(there) + 3))) if n not in there)


def state_of(model: nn.Module) -> Host:
    """Return the (sub)module that carries adapters and its state. Raises AddendaError when nothing is attached."""
    host = find_state(model)
    if host is None:
        raise AddendaError(f"No adapter is attached to this {type(unwrap(model)).__name__}. Call attach or load first.")
    return host


def record_of(model: nn.Module, name: str) -> HostRecord:
    """Return an adapter's record with its (sub)module and state. Raises AddendaError for an unknown name."""
    root, state = state_of(model)
    if not (isinstance(name, str) and name in state.records):
        raise AddendaError(
            f"No adapter is called {name!r} on this {type(root).__name__}.{nearest(name, state.records)} "
            f"Attached: {', '.join(map(repr, state.records))}."
        )
    return HostRecord(root, state, state.records[name])


def check_name(state: State | None, name: str) -> None:
    """Raise AddendaError for a name that no adapter can have, or that one of the model has."""
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)):
        raise AddendaError(f"An adapter's name has 1-64 letters, digits, '_' or '-'; got {name!r}.")
    if name in dir(Slots()):
        raise AddendaError(
            f"{name!r} is what torch or this library calls something on every module, so no adapter can be called so. "
            f"Choose another name, e.g. name={f'{name}-1'.lstrip('_')!r}."
        )
    if state is not None and name in state.records:
        raise AddendaError(
            f"An adapter called {name!r} is attached already. Choose another name=, or detach(model, {name!r}) first."
        )


def tensors_at(root: nn.Module, name: str, path: str) -> SiteTensors:
    """Return one adapter's tensors at one site. Raises AddendaError where its module was replaced or resized."""
    module_path, hidden, _ = path.partition("@")
    owner_path, _, leaf = module_path.rpartition(".")
    tensors = weight = None
    try:
        owner = root.get_submodule(owner_path)
    except AttributeError:
        owner = None
    if owner is not None:
        child = owner._modules.get(leaf)
        slots = slots_of(owner if child is None else child)
        parameter = "output" if hidden else leaf if child is None else "weight"
        tensors = None if slots is None else slots.held(name, parameter)
        weight = (owner if child is None else child)._parameters.get(parameter)
    if tensors is None:
        raise AddendaError(f"{path} is no longer the module that adapter {name!r} was attached to. {_MOVED}")
    if weight is not None and tensors.fits and tuple(weight.shape) != tensors.fits:
        raise AddendaError(
            f"{path} is {tuple(weight.shape)} now, and adapter {name!r} was attached to {tensors.fits}. {_MOVED}"
        )
    return tensors


def intact(root: nn.Module, name: str, record: Record) -> None:
    """Raise AddendaError where a module that an adapter is on has been replaced or resized since."""
    for path in record.methods:
        tensors_at(root, name, path)


def apply_active(root: nn.Module, state: State, names: tuple[str, ...], stay: bool = False) -> None:
    """Make exactly these adapters live on every module, for all that are in no block.

    stay: the calling context stays in the blocks that it is in; else these adapters act there too, until the innermost
    ends. Raises AddendaError, with nothing changed, while another thread runs a forward of the model.
    """
    with alone(root, "switch"):
        acting = () if state.merged is not None else names
        planned = {s: s.activated(acting) for m in root.modules() if (s := slots_of(m)) is not None}
        link(root, state, planned)
        with _all_or_none(root, state, planned):
            state.active = names
            state.last = names or tuple(n for n in state.last if n in state.records)
            for slots, acts in planned.items():
                slots.own = acts
            if compiled.seen and not names:
                _stand_in(root, state)
            if not stay:
                leave([b for b in blocks() if b in state.blocks])
            for block in list(state.blocks):  # places may have come or gone
                apply_block(root, state, block)
            mirror(root, state)


@contextmanager
def _all_or_none(root: nn.Module, state: State, planned: Iterable[Slots]) -> Iterator[None]:
    """Let what acted before act again, on every module, where a `with` block ends with an error or Ctrl-C."""
    active, last, around = state.active, state.last, blocks()
    owned = [(slots, slots.own, slots.traced) for slots in planned]
    try:
        yield
    except BaseException:
        state.active, state.last = active, last
        for slots, own, traced in owned:
            slots.own, slots.traced = own, traced
        enter(around)
        mirror(root, state)
        raise


def apply_again(root: nn.Module, state: State, active: tuple[str, ...], around: tuple[Block, ...]) -> None:
    """Make the adapters act again that acted before, as far as they still exist. A change merged meanwhile stays."""
    if state.merged is None:
        apply_active(root, state, tuple(n for n in active if n in state.records), stay=True)
        enter(around)
        mirror(root, state)


@contextmanager
def acting_again(root: nn.Module, state: State) -> Iterator[None]:
    """Let behind a `with` block act what acted before, in the caller's blocks too, whatever was made to act in it."""
    active, around = state.active, blocks()
    try:
        yield
    finally:
        apply_again(root, state, active, around)


def apply_block(root: nn.Module, state: State, block: Arrangement) -> None:
    """Set what acts on every module inside of this block."""
    all_slots = [s for m in root.modules() if (s := slots_of(m)) is not None]
    if not state.records.keys() >= set(block.names):  # one of its adapters was taken off: what acts for all acts there
        state.blocks.discard(block)
        for slots in all_slots:
            if slots.blocks is not None:
                slots.blocks.pop(block, None)
        return
    merged = state.merged is not None  # which is then all that acts
    planned = {s: s.activated(()) if merged else s.arranged(block.names, block.mix, block.in_turn) for s in all_slots}
    link(root, state, planned)
    state.blocks.add(block)
    for slots, acts in planned.items():
        if slots.blocks is None:
            slots.blocks = WeakKeyDictionary()
        acts.mark = block.number
        slots.blocks[block] = acts


def mirror(root: nn.Module, state: State) -> None:
    """Tell compiled forwards of this thread in which block they run, and late backwards what acts from now on."""
    block = state.here.block = state.arrangement
    for module in root.modules():
        if (slots := slots_of(module)) is not None:
            slots.here.acting, slots.history = slots.within(), state.history
    state.history.note(block.number if block else () if state.merged is not None else state.active)


def _stand_in(root: nn.Module, state: State) -> None:
    """Let compiled forwards run what acted last, on tensors that change nothing, where nothing acts any more."""
    if state.merged is not None:
        return
    owners, held = owners_of(root), []
    for name in state.last:
        for path in state.records[name].methods:
            with suppress(AddendaError):  # replaced since; see `intact`
                held.append((site_at(root, path, owners), tensors_at(root, name, path)))
    planned = {s: s.activated(state.last) for m in root.modules() if (s := slots_of(m)) is not None}
    link(root, state, planned)
    stills = Stills(held)
    for slots, acts in planned.items():
        slots.traced = Acting({p: stills.of(group) for p, group in acts.live.items()})


def sweep(root: ReferenceType[nn.Module]) -> None:
    """Spare forwards the look for blocks, at modules where nobody is in one any more."""
    model = root()
    with lock:
        for module in () if model is None else model.modules():
            if (slots := slots_of(module)) is not None and slots.blocks is not None and not [*slots.blocks]:
                slots.blocks = None


def link(root: nn.Module, state: State, planned: dict[Slots, Acting]) -> None:
    """Tell modules that take part in a site without holding its tensors which changes will act there."""
    owners = owners_of(root)
    for path in dict.fromkeys(path for record in state.records.values() for path in record.methods):
        try:
            site = site_at(root, path, owners)
        except AddendaError:
            continue
        first = slots_of(site.module)
        if first is None or first not in planned or site.parameter not in planned[first].live:
            continue  # replaced since; see `intact`
        _link_ties(site, planned[first], planned)
        if isinstance(site, Point):
            _link_point(site, first, planned)


def _link_ties(site: Site, acts: Acting, planned: dict[Slots, Acting]) -> None:
    """Let further owners of a tied parameter read the first owner's tensors."""
    for owner, parameter in site.ties:
        slots = slots_of(owner)
        if slots is not None:
            slots.kinds[parameter] = site.kind
            planned[slots].live[parameter] = acts.live[site.parameter]
            if site.parameter in acts.each:
                planned[slots].each[parameter] = acts.each[site.parameter]


def _link_point(point: Point, slots: Slots, planned: dict[Slots, Acting]) -> None:
    """Tell the module whose input is read by how many changes, and that which undoes them what to undo."""
    live = planned[slots].at("output")
    source = None if point.source is None else slots_of(point.source)
    if source is not None:
        planned[source].readers += sum(1 for t in live if source in t.source)
    back = None if point.back is None else slots_of(point.back)
    if back is not None and live and slots not in planned[back].undoes:
        planned[back].undoes = (*planned[back].undoes, slots)
