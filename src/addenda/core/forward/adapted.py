"""How a change lives in a module: a class derived in place, and a child module `addenda` that holds the tensors.

    q_proj (AdaptedLinear, still a Linear; its own keys untouched)
    └── addenda                     Slots: which adapters are here, and which of them are live
        └── maths                   one adapter
            └── weight              SiteTensors: its tensors for that parameter: A, B, …
                └── pool            Pool: what all sites of the method train together; one module, held by each

Only `forward` (for modules called with their weight) and the attribute of a raw parameter (a property) are overridden.
`detach` puts the class back; copying and pickling go through `_rebuild`, which derives the class anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward import acting
from addenda.core.forward.acting import Acting, Blocks, Here
from addenda.core.forward.execute import effective, execute
from addenda.core.forward.per_example import Mixed
from addenda.core.method.contract import Method, Params
from addenda.core.method.hidden import in_turn, run, undone
from addenda.core.modules.late_backward import first, told, used
from addenda.core.modules.returned import version_of
from addenda.core.packed.few_bits import quantised
from addenda.core.packed.tensor import Packed
from addenda.core.site.site import OUTPUT, PARAMETER, Kind, Point, Site, has_another_forward


class Pool(nn.Module):
    """What all sites of a method train together: one module that each of them holds, so that a tensor has one owner.

    torch sees a shared module once, as it does shared layers: one parameter for optimizers and flags, one in copies.
    """

    def __init__(self, method: Method, tensors: Params):
        super().__init__()
        self.method = method
        self._parameters.update({name: nn.Parameter(tensor) for name, tensor in tensors.items()})

    def _save_to_state_dict(self, destination, place, keep_vars) -> None:
        """Once, under the name of the first holder: safetensors and the Hugging Face Trainer refuse shared memory."""
        written = destination.__dict__.setdefault("_addenda_pools", set())
        if id(self) not in written:
            written.add(id(self))
            super()._save_to_state_dict(destination, place, keep_vars)

    def _load_from_state_dict(self, state_dict, place, metadata, strict, missing, unexpected, errors) -> None:
        """Where it has been read under another holder's name in this call, it is not missing."""
        here = any(f"{place}{k}" in state_dict for k in self._parameters)
        if here or self.__dict__.get("_read_for") is not missing:
            super()._load_from_state_dict(state_dict, place, metadata, strict, missing, unexpected, errors)
        if here:
            self.__dict__["_read_for"] = missing  # the list that stands for this call of load_state_dict

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_read_for"}

    def stored(self) -> Params:
        """What a file holds, detached."""
        return {k: t.detach() for k, t in self._parameters.items() if t is not None}

    def extra_repr(self) -> str:
        return f"{self.method}"


class SiteTensors(nn.Module):
    """One adapter's tensors at one site, each registered by its kind (see `core.method.contract`)."""

    def __init__(
        self,
        method: Method,
        own: Params,
        derived: Params,
        shared: Params,
        pool: Pool | None = None,
        stacked: bool = False,
    ):
        super().__init__()
        self.method: Any = method
        self.stacked = stacked  # the first dimension of what is its own counts the matrices of a stack
        self.instead: Params = {}  # what is read in the place of the tensors of these names
        self.path, self.width, self.reads = "", 0, ""  # where an activation is changed: see `sites.Point`
        self.fits: tuple[int, ...] = ()  # the shape of the weight that it was made for
        self.past: Any = None  # where the method follows a cache, its length: a `past.Past`
        self.source: tuple[Slots, ...] = ()  # of the module whose input is read
        self.frozen = tuple(k for k, t in own.items() if not isinstance(t, nn.Parameter))
        self.shared = tuple(shared)  # in a stack of matrices, the same for all of them
        if pool is not None:
            self.shared += tuple(pool._parameters)
            self._modules["pool"] = pool
        for name, tensor in own.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self._buffers[name] = tensor
        for name, tensor in (shared | derived).items():
            self._buffers[name] = tensor
            self._non_persistent_buffers_set.add(name)
        self.drawn: tuple[str, ...] = ()  # names of frozen tensors that have a value for training only

    def tensors(self) -> Params:
        """Every tensor by name, as a method's functions take them."""
        p = self.held()
        if self.method.bits is not None:
            p |= {k: self._read(p[k]) for k in self.matrices}
        p |= self.instead
        for name in self.drawn:
            value = p.pop(f"{name} in training")
            if self.training:
                p[name] = value
        return p

    def held(self) -> Params:
        """Every tensor by name, as it is held."""
        pool = self._modules.get("pool")
        return {**self._parameters, **self._buffers, **({} if pool is None else pool._parameters)}  # type: ignore[dict-item]

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the trainable tensors that are matrices, or stacks of them: what `bits` is for."""
        return tuple(k for k, t in self._parameters.items() if t is not None and t.dim() - self.stacked >= 2)

    def _read(self, matrix: Tensor) -> Tensor:
        """A trainable matrix as the method sees it, in few bits."""
        if isinstance(matrix, Packed):
            return matrix.dense()
        return quantised(matrix, self.method.bits, self.method.ste, self.stacked)

    def stored(self) -> Params:
        """What a file holds: trainable and frozen tensors, detached."""
        return {k: t.detach() for k, t in {**self._parameters, **{k: self._buffers[k] for k in self.frozen}}.items()}

    def draw(self, values: Params) -> None:
        """Set this step's values of frozen tensors, in place after the first time."""
        for name, value in values.items():
            key = f"{name} in training"
            if key in self._buffers:
                self._buffers[key].copy_(value)
            else:
                fixed = self._buffers[name]  # one value for every matrix of a stack
                self._buffers[key] = value.to(fixed.device).expand(fixed.shape).clone()
                self._non_persistent_buffers_set.add(key)
        self.drawn = tuple(values)

    def extra_repr(self) -> str:
        return f"{self.method}"


class Slots(nn.Module):
    """The adapters of one module, and what of them acts for whom: see `core.forward.acting`."""

    def __init__(self):
        super().__init__()
        self.kinds: dict[str, Kind] = {}
        self.own = Acting()  # by the model's state
        self.blocks: Blocks | None = None  # by block; None where no block is
        self.here = Here()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("blocks", "here")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.blocks, self.here = None, Here()

    def _replicate_for_data_parallel(self) -> "Slots":
        """A replica runs in a thread of its own, and does what acts here."""
        replica: Any = super()._replicate_for_data_parallel()
        replica.own, replica.blocks, replica.here = self.acting(), None, Here()
        return replica

    def acting(self) -> Acting:
        """What acts in a forward that runs now; in one that is computed again in backward, what acted in it."""
        if torch.compiler.is_compiling():
            if acting.tasks.blocks:
                raise AddendaError("A compiled forward cannot tell in which asyncio task's `with` block it runs.")
            return self.here.acting or self.own
        if acting.gate.closed:
            acting.wait()
        if first():
            return self.own if self.blocks is None else self._chosen()
        return used(self, self._chosen)

    def _chosen(self) -> Acting:
        if self.blocks is None:
            return self.own
        if (again := told(acting.Block)) is not None:  # a reentrant checkpoint's forward ran in this block, or in none
            return self.own if again is acting.Block else self.blocks.get(again, self.own)
        return self.within() or self.own

    def within(self) -> Acting | None:
        """What acts by the blocks around the running code."""
        for block in reversed(acting.blocks()) if self.blocks is not None else ():
            found = self.blocks.get(block)
            if found is not None and not block.over():
                return found
        return None

    @property
    def live(self) -> dict[str, tuple[SiteTensors, ...]]:
        return self.acting().live

    @live.setter
    def live(self, value: dict[str, tuple[SiteTensors, ...]]) -> None:
        self.own = replace(self.own, live=value)

    @property
    def each(self) -> dict[str, Mixed]:
        return self.acting().each

    @property
    def readers(self) -> int:
        return self.acting().readers

    @property
    def seen(self) -> Tensor | None:
        return self.here.seen

    @property
    def waiting(self) -> int:
        return self.here.waiting

    @property
    def now(self) -> dict[tuple[str, bool], Tensor] | None:
        return self.here.now

    def add(self, adapter: str, site: Site, tensors: SiteTensors) -> None:
        if adapter not in self._modules:
            self._modules[adapter] = nn.Module()
        self._modules[adapter]._modules[site.parameter] = tensors
        if not isinstance(site, Point):
            tensors.fits = tuple(site.stored)
        else:
            tensors.path, tensors.width, tensors.reads = site.path, site.width, site.reads
            source = None if site.source is None else slots_of(site.source)
            tensors.source = () if source is None else (source,)
        self.kinds[site.parameter] = site.kind

    def remove(self, adapter: str) -> None:
        self._modules.pop(adapter, None)
        left = {p for held in self._modules.values() for p in held._modules}
        self.kinds = {p: k for p, k in self.kinds.items() if p in left}
        self.live = {p: () for p in self.kinds}

    def held(self, adapter: str, parameter: str) -> SiteTensors | None:
        """An adapter's tensors here, or None."""
        found = self._modules[adapter]._modules.get(parameter) if adapter in self._modules else None
        return found if isinstance(found, SiteTensors) else None

    def arranged(self, adapters: Sequence[str], mix: Callable[..., Mixed], in_turn: tuple[str, ...]) -> Acting:
        """What `mix` makes of the adapters' tensors acts at each parameter; at raw ones those of `in_turn`, if any."""
        found = self.activated(())
        for parameter, kind in self.kinds.items():
            held = [self.held(a, parameter) for a in adapters]
            if kind == PARAMETER:
                found.live[parameter] = tuple(t for a in in_turn if (t := self.held(a, parameter)) is not None)
            elif any(t is not None for t in held):
                found.each[parameter] = mix(held)
        return found

    def activated(self, adapters: tuple[str, ...]) -> Acting:
        """The adapters, one after another."""
        every = {p: [self.held(a, p) for a in adapters] for p in self.kinds}
        return Acting({p: tuple(h for h in held if h is not None) for p, held in every.items()})

    def done(self) -> None:
        """One of the changes that read this module's input has done so."""
        self.here.waiting -= 1
        if self.here.waiting <= 0:
            self.here.seen = None


class Adapted:
    """Mixed in before the module's own class; see `adapt`."""

    _addenda_properties: tuple[str, ...]

    def __reduce_ex__(self, protocol):
        return _rebuild, (_original(type(self)), self._addenda_properties), self.__getstate__()


def _original(cls: type) -> type:
    return cls.__mro__[2]  # Derived, Adapted, original, …


def _rebuild(original: type, properties: tuple[str, ...]) -> nn.Module:
    cls: Any = _derive(original, properties)
    return cls.__new__(cls)


def _own(module: nn.Module, original: type, slots: Slots, acts: Acting, *args, **kwargs) -> Any:
    """The module's forward with what is changed in its weights."""
    live = acts.live.get("weight", ())
    if (live or "weight" in acts.each) and slots.kinds["weight"] != PARAMETER:
        x, *rest = args or [kwargs.pop(next(iter(kwargs)))]
        if "weight" in acts.each:
            return acts.each["weight"].layer(module, original, slots.kinds["weight"], x, *rest, **kwargs)
        return execute(module, original, slots.kinds["weight"], live, x, *rest, **kwargs)
    if not any(ts for p, ts in acts.live.items() if slots.kinds[p] == PARAMETER):
        return original.forward(module, *args, **kwargs)
    here = slots.here
    outer, here.now = here.now, {}
    try:
        return original.forward(module, *args, **kwargs)
    finally:
        here.now = outer


@cache
def _derive(original: type, properties: tuple[str, ...]) -> type:
    """The class that extends `original` in place: its forward, and a property for each raw parameter."""

    def forward(self, *args, **kwargs):
        slots = self._modules["addenda"]
        acts = slots.acting()
        for other in acts.undoes:
            there = other.acting()
            args, kwargs = undone(there.at("output"), there.each.get("output"), args, kwargs)
        if acts.readers:
            here = slots.here
            here.seen, here.waiting = args[0] if args else next(iter(kwargs.values())), acts.readers
            here.version = version_of(here.seen)
        changes = acts.at("output")
        if not changes or slots.kinds["output"] != OUTPUT:
            return _own(self, original, slots, acts, *args, **kwargs)
        act = acts.each["output"].act if "output" in acts.each else in_turn(changes)
        return run(changes, act, partial(_own, self, original, slots, acts), args, kwargs)

    members = {
        "forward": forward,
        "_addenda_properties": properties,
        "__module__": __name__,
        "__doc__": original.__doc__,
    }
    members |= {name: _property(name) for name in properties}
    return type(f"Adapted{original.__name__}", (Adapted, original), members)


@cache
def _property(name: str) -> property:
    """The attribute of a raw parameter: its effective value while an adapter is live, else what is stored.

    Within one forward of the owner it is computed once, however often the owner reads it (once an expert, say).
    """

    def read(self) -> Tensor | None:
        slots, stored = self._modules["addenda"], self._parameters[name]
        live, now = slots.acting().live.get(name, ()), slots.here.now
        if not live:
            return stored
        if now is None:
            return effective(slots.kinds[name], stored, live)
        key = (name, torch.is_grad_enabled())
        if key not in now:
            now[key] = effective(slots.kinds[name], stored, live)
        return now[key]

    def write(self, value) -> None:
        self.register_parameter(name, value)

    return property(read, write)


def original_class(module: nn.Module) -> type:
    """The module's own class, whether it is adapted or not."""
    return _original(type(module)) if isinstance(module, Adapted) else type(module)


def set_original_class(module: nn.Module, cls: type) -> None:
    """Give the module another class of its own; if it is adapted it stays so."""
    module.__class__ = _derive(cls, module._addenda_properties) if isinstance(module, Adapted) else cls


def adapt(site: Site) -> Slots:
    """Extend the class of the modules that take part in a site, and give them their slots. Returns the first one's."""
    slots = slots_of(site.module) or Slots()
    site.module._modules["addenda"] = slots
    for module in site.modules:
        if "addenda" not in module._modules:
            module._modules["addenda"] = Slots()
    owned = ((site.module, site.parameter), *site.ties) if site.kind == PARAMETER else ()
    for module in site.modules:
        properties: set[str] = set(getattr(module, "_addenda_properties", ()))
        properties |= {name for owner, name in owned if owner is module}
        _drop_own_forward(module)
        module.__class__ = _derive(original_class(module), tuple(sorted(properties)))
    return slots


def _drop_own_forward(module: nn.Module) -> None:
    """Take away a forward on the instance that is its class's own, as hooks leave it: it would outlive the class."""
    if not has_another_forward(module):
        module.__dict__.pop("forward", None)


def release(module: nn.Module) -> None:
    """Give the module its own class back and drop the slots."""
    if isinstance(module, Adapted):
        _drop_own_forward(module)
        module.__class__ = original_class(module)
        del module._modules["addenda"]


def slots_of(module: nn.Module) -> Slots | None:
    slots = module._modules.get("addenda") if isinstance(module, Adapted) else None
    return slots if isinstance(slots, Slots) else None


@torch.no_grad()
def effective_weight(site: Site, live: tuple[SiteTensors, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """W + ΔW of one site in the given dtype, in the stored shape."""
    return effective(site.kind, site.weight.detach().to(dtype), live)
