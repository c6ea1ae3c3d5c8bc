"""Lean modules, which compute cheap intermediates again in backward instead of keeping them.

    gated MLP    down(act(gate) · up)    keeps gate and up; not act(gate), nor the product under an adapted `down`
    RMS norm     in float32, as Llama's  keeps its input; not the float32 copy, nor the output under adapted layers

Output and gradients are the same bits: backward runs the same operations on the same inputs (`core.modules.recompute`).
Only in a float32 model the gradient of a norm's input is summed in another order. Gradient checkpointing, which
computes everything again by itself, and torch.compile, which decides for itself what to keep, work as without lean.

A module becomes lean by a class derived in place, as an adapted one does (`core.forward.adapted`): copies and pickles
stay lean, and `unlean` puts the class back.
"""

import copyreg
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.forward.acting import Acting
from addenda.core.forward.slots import slots_of
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.classes import Adapted, original_class, set_original_class
from addenda.core.modules.ours import CHILD
from addenda.core.modules.recompute import cheap
from addenda.core.modules.wrappers import model_in, unwrap


@checked()
def lean(model: nn.Module) -> list[str]:
    """Make every gated MLP and RMS norm of the model lean, and return their paths. Adapters may come before or after.

    An MLP is known by its children (gate_proj and up_proj, or gate_up_proj; down_proj; act_fn or activation_fn), and
    trusted only if it computes what such an MLP should, bit for bit, and its activation changes nothing in place.
    Raises AddendaError where nothing is found.
    """
    classes = {}
    for path, module in model_in(model).named_modules():
        cls = original_class(module)
        if issubclass(cls, Lean):
            classes[path] = (module, cls)
        elif _is_gated(module):
            classes[path] = (module, _lean(cls, _gated))
        elif "RMSNorm" in cls.__name__ and not cls.__module__.startswith("torch."):  # torch's own keeps no copy
            classes[path] = (module, _lean(cls, _norm))
    if not classes:
        raise AddendaError(
            f"Nothing in this {type(unwrap(model)).__name__} can be lean: it has no gated MLP (gate_proj and up_proj, "
            "or gate_up_proj; down_proj; act_fn) and no RMS norm. Use gradient checkpointing instead."
        )
    for module, cls in classes.values():
        set_original_class(module, cls)
    return list(classes)


@checked()
def unlean(model: nn.Module) -> None:
    """Give every lean module its own class back. Raises AddendaError where none is lean."""
    modules = [m for m in model_in(model).modules() if issubclass(original_class(m), Lean)]
    if not modules:
        raise AddendaError(f"No module of this {type(unwrap(model)).__name__} is lean. Call lean(model) first.")
    for module in modules:
        set_original_class(module, _plain(original_class(module)))


@contextmanager
def leaner(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Make the model lean for the length of a `with` block; what is lean already stays so."""
    if not on or any(issubclass(original_class(m), Lean) for m in unwrap(model).modules()):
        yield
        return
    lean(model)
    try:
        yield
    finally:
        unlean(model)


# -- the classes -------------------------------------------------------------------------------------------------------

Forward = Callable[[type, nn.Module, Tensor], Tensor]  # (own class, module, x)


class Lean:
    """The class mixed in before a lean module's own class."""


class _LeanType(type):
    """The type of lean classes: they are made when needed, so a pickle names the class that each is made from."""

    _addenda_forward: Forward


def _plain(cls: type) -> type:
    return cls.__mro__[2]  # derived, Lean, the module's own, …


@cache
def _lean(original: type, compute: Forward) -> type:
    def forward(self, x, *rest, **options):
        if rest or options:
            return original.forward(self, x, *rest, **options)
        return compute(original, self, x)

    members = {"forward": forward, "_addenda_forward": staticmethod(compute), "__module__": __name__}
    return _LeanType(f"Lean{original.__name__}", (Lean, original), members)


copyreg.pickle(_LeanType, lambda cls: (_lean, (_plain(cls), cls._addenda_forward)))


def _norm(original: type, module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, Adapted) or _trains(module):
        return original.forward(module, x)
    return cheap(partial(original.forward, module), x)


def _gated(original: type, module: nn.Module, x: Tensor) -> Tensor:
    children: Any = module._modules
    act = children.get("act_fn") or children["activation_fn"]
    if "gate_up_proj" in children:
        gate, up = children["gate_up_proj"](x).chunk(2, -1)
    else:
        gate, up = children["gate_proj"](x), children["up_proj"](x)
    product = act(gate) * up if _trains(act) else cheap(lambda gate, up: act(gate) * up, gate, up)
    return children["down_proj"](product)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@contextmanager
def _bare(module: nn.Module) -> Iterator[None]:
    """Switch off, for a `with` block, the changes in a module, some of which read what runs before it."""
    states = [(s, s.own, s.blocks) for m in module.modules() if (s := slots_of(m)) is not None]
    for slots, _, _ in states:
        slots.own, slots.blocks = Acting({p: () for p in slots.kinds}), None
    try:
        yield
    finally:
        for slots, acting, blocks in states:
            slots.own, slots.blocks = acting, blocks


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Return whether the module is a gated MLP by its children and, in training mode, by what it computes."""
    names = set(module._modules) - {CHILD}
    if names not in (
        {*projections, "down_proj", act}
        for projections in (("gate_proj", "up_proj"), ("gate_up_proj",))
        for act in ("act_fn", "activation_fn")
    ):
        return False
    first = module._modules.get("gate_proj") or module._modules["gate_up_proj"]
    if not isinstance(first, nn.Linear):
        return False
    w = first.weight
    if w.is_meta:
        return False
    generator = torch.Generator(w.device).manual_seed(0)
    dtype = w.dtype if w.is_floating_point() else torch.get_default_dtype()
    x = torch.randn(2, 3, first.in_features, generator=generator, device=w.device).to(dtype)
    act: Any = module._modules.get("act_fn") or module._modules["activation_fn"]
    outputs, probe = [], torch.zeros_like(x)
    with _bare(module), training_mode(module, True), torch.random.fork_rng([w.device] if w.is_cuda else []):
        for compute in (module, partial(_gated, type(module), module)):
            torch.manual_seed(0)  # of dropout
            try:
                outputs.append(compute(x))
            except (TypeError, ValueError, RuntimeError):  # it reads something else beside x
                return False
        act(probe)
    return torch.equal(*outputs) and probe._version == 0
