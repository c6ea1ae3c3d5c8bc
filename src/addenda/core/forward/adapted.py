"""How a change lives in a module: a class derived in place, and a child module `addenda` that holds the tensors.

    q_proj (AdaptedLinear, still a Linear; its own keys untouched)
    └── addenda                     Slots: which adapters are here, and which of them are live
        └── maths                   one adapter
            └── weight              SiteTensors: its tensors for that parameter: A, B, …
                └── pool            Pool: what all sites of the method train together; one module, held by each

Only `forward` (for modules called with their weight) and the attribute of a raw parameter (a property) are overridden.
`detach` puts the class back; copying and pickling go through `_rebuild`, which derives the class anew.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.sharded import is_sharded
from addenda.core.forward.acting import Acting
from addenda.core.forward.execute import effective, execute
from addenda.core.forward.grouped import Grouped, Part, split
from addenda.core.forward.hidden import in_turn, run, undone
from addenda.core.forward.slots import Slots, slots_of
from addenda.core.forward.tensors import SiteTensors
from addenda.core.modules.classes import Adapted, original_class, refuse_derived
from addenda.core.modules.returned import version_of
from addenda.core.site.kinds import OUTPUT, PARAMETER
from addenda.core.site.site import Site, has_another_forward


def _rebuild(original: type, properties: tuple[str, ...]) -> nn.Module:
    cls: Any = _derive(original, properties)
    return cls.__new__(cls)


def _own(module: nn.Module, original: type, slots: Slots, acts: Acting, *args, **kwargs) -> Any:
    """Run the module's forward with the changes of its weights."""
    if acts.each and slots.here.group is None:
        raw = {p: m for p, m in acts.each.items() if slots.kinds[p] == PARAMETER}
        groups = {p: m for p, m in raw.items() if isinstance(m, Grouped)}
        if groups:
            return _by_group(module, original, slots, acts, groups, *args, **kwargs)
        if raw:
            mixed = {p: m for p, m in acts.each.items() if slots.kinds[p] != OUTPUT}
            run = partial(_under, module, original, slots, acts)
            return next(iter(raw.values())).whole(run, module, mixed, args, kwargs)
    live = acts.live.get("weight", ())
    if (live or "weight" in acts.each) and slots.kinds["weight"] != PARAMETER:
        x, *rest = args or [kwargs.pop(next(iter(kwargs)))]
        if "weight" in acts.each:
            return acts.each["weight"].layer(module, original, slots.kinds["weight"], x, *rest, **kwargs)
        return execute(module, original, slots.kinds["weight"], live, x, *rest, **kwargs)
    local = slots.here
    raw = local.group or {p: ts for p, ts in acts.live.items() if slots.kinds[p] == PARAMETER}
    if not any(raw.values()):
        return original.forward(module, *args, **kwargs)
    outer, local.now = local.now, {}
    try:
        return original.forward(module, *args, **kwargs)
    finally:
        local.now = outer


def _by_group(module: nn.Module, original: type, slots: Slots, acts: Acting, raw: dict, *args, **kwargs) -> Any:
    """Run the module's forward once for each group of rows, with this group's raw parameters."""
    groups, local = next(iter(raw.values())).groups, slots.here

    def run(part: Part, args: tuple, kwargs: dict) -> Any:
        local.group = {p: () if (t := m.held[part.slot]) is None else (t,) for p, m in raw.items()}
        outer, groups.parts = groups.parts, (Part(part.slot),)
        try:
            return _own(module, original, slots, acts, *args, **kwargs)
        finally:
            local.group, groups.parts = None, outer

    return split(groups, run, original.__name__, args, kwargs)


def _under(
    module: nn.Module, original: Any, slots: Slots, acts: Acting, held: dict, x: Tensor, rest: tuple, options: dict
) -> Any:
    """Run the module's forward on x with these tensors at its parameters, and at all others with what acts there."""
    local = slots.here
    live = {p: held.get(p, acts.live.get(p, ())) for p in slots.kinds if slots.kinds[p] != OUTPUT}
    kind = slots.kinds.get("weight", PARAMETER)
    outer = local.group, local.now
    local.group, local.now = {p: ts for p, ts in live.items() if slots.kinds[p] == PARAMETER}, {}
    try:
        if kind != PARAMETER and live["weight"]:
            return execute(module, original, kind, live["weight"], x, *rest, **options)
        return original.forward(module, x, *rest, **options)
    finally:
        local.group, local.now = outer


@cache
def _derive(original: type, properties: tuple[str, ...]) -> type:
    """Return the class that extends `original` in place: its forward, and a property for each raw parameter."""

    def forward(self, *args, **kwargs):
        slots = self._modules.get("addenda")
        if slots is None:  # detached, and somebody holds the forward of before, as hooks do
            return original.forward(self, *args, **kwargs)
        acts = slots.acting()
        for source in acts.undoes:
            acting = source.acting()
            args, kwargs = undone(acting.at("output"), acting.each.get("output"), args, kwargs)
        if acts.readers:
            local = slots.here
            local.seen, local.waiting = args[0] if args else next(iter(kwargs.values())), acts.readers
            local.version = version_of(local.seen)
        changes = acts.at("output")
        if not changes or slots.kinds["output"] != OUTPUT:
            return _own(self, original, slots, acts, *args, **kwargs)
        act = acts.each["output"].act if "output" in acts.each else in_turn(changes)
        return run(changes, act, partial(_own, self, original, slots, acts), args, kwargs)

    forward.__dict__["own_forward_of"] = original

    def reduced(self, protocol):
        return _rebuild, (original, properties), self.__getstate__()

    members = {
        "forward": forward,
        "__reduce_ex__": reduced,
        "_addenda_properties": properties,
        "_addenda_derive": staticmethod(_derive),
        "__module__": __name__,
        "__doc__": original.__doc__,
    }
    members |= {name: _property(name) for name in properties}
    return type(f"Adapted{original.__name__}", (Adapted, original), members)


@cache
def _property(name: str) -> property:
    """Return the property of a raw parameter: its effective value while an adapter is live, else the stored one.

    Within one forward of the owner it is computed once, however often the owner reads it (once an expert, say).
    """

    def read(self) -> Tensor | None:
        slots, stored = self._modules["addenda"], self._parameters[name]
        local = slots.here
        live, weights = (local.group or slots.acting().live).get(name, ()), local.now
        if not live:
            return stored
        if weights is None and is_sharded(stored):
            return stored  # FSDP2 looks for its own part of the parameter; a forward reads whole ones
        if weights is None:
            return effective(slots.kinds[name], stored, live)
        key = (name, torch.is_grad_enabled())
        if key not in weights:
            weights[key] = effective(slots.kinds[name], stored, live)
        return weights[key]

    def write(self, value) -> None:
        self.register_parameter(name, value)

    return property(read, write)


def adapt(site: Site) -> Slots:
    """Extend the class of the modules that take part in a site, and return the slots of the first one."""
    for module in site.modules:
        refuse_derived(module, site.path)
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
    """Remove a forward on the instance that is its class's own, as hooks leave it: it would outlive the class."""
    if not has_another_forward(module):
        module.__dict__.pop("forward", None)


def release(module: nn.Module) -> None:
    """Give the module its own class back and drop the slots."""
    if isinstance(module, Adapted):
        _drop_own_forward(module)
        module.__class__ = original_class(module)
        del module._modules["addenda"]


@torch.no_grad()
def effective_weight(site: Site, live: tuple[SiteTensors, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W + ΔW of one site in the given dtype, in the stored shape."""
    return effective(site.kind, site.weight.detach().to(dtype), live)
