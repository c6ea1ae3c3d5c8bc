"""Finding weights that are read past their module's forward, where a change of the layer does not act.

A layer's change acts in the layer's forward. Whoever computes with its `.weight` without calling it, as in
`x @ self.lin.weight.T`, sees the base alone: training moves nothing there, and a merge would change it all the same.
So forwards are watched: every operation that takes the values of an adapted weight while its module does not run is
such a read; a look at dtype, shape or device is none. One forward of every kind is watched (in training or not, with
these arguments, on one token or more), so that later ones cost nothing; compiled ones cannot be.
"""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import is_sharded
from addenda.core.packed.tensor import parts_of
from addenda.core.site.kinds import OUTPUT, PARAMETER
from addenda.core.site.site import Site, owners_of, site_at
from addenda.core.state.state import State

_SHAPE_ONLY = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
_KINDS = 64  # of forwards that are watched at most
_OWN = tuple(os.path.dirname(f) + os.sep for f in (__file__, torch.__file__))
_setting = threading.Lock()


class Reads(TorchDispatchMode):
    """A dispatch mode that notes in `found` which of these layers' weights are read past their forward, and by whom."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.found: dict[str, str] = {}
        self.layers = layers
        self.storages: dict[int, str] = {}
        for path, module in layers.items():
            weight = module._parameters.get("weight")
            if weight is not None and not is_sharded(weight):
                self.storages |= {s: path for part in parts_of(weight) for s in _storage(part)}
        self.running: dict[str, int] = {}
        self.thread = threading.get_ident()
        self.paused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            not self.paused and _takes_values(func) and torch._C._current_autograd_node() is None
        ):  # gradients pass weights
            for t in tree_leaves((args, kwargs)):
                for path in self._of(t):
                    if not (self.running.get(path) or path in self.found or _in_a_hook_of(self.layers[path])):
                        self.found[path] = _reader()
        return func(*args, **kwargs)

    def _of(self, t: Any) -> Iterator[str]:
        if isinstance(t, Tensor):
            for part in parts_of(t):
                for storage in _storage(part):
                    if storage in self.storages:
                        yield self.storages[storage]

    def open(self) -> bool:
        """Start watching; False where another thread watches one of these modules."""
        with _setting:
            if any(_is_own(m.__dict__.get("forward")) for m in self.layers.values()):
                return False
            for path, module in self.layers.items():
                replaced = module.__dict__.get("forward")
                module.__dict__["forward"] = partial(_inside, self, path, module.forward, replaced)
        self.__enter__()
        return True

    def close(self) -> None:
        self.__exit__(None, None, None)
        for module in self.layers.values():
            forward = module.__dict__.get("forward")
            if _is_own(forward) and forward.args[0] is self:
                module.__dict__.pop("forward")
                if forward.args[3] is not None:
                    module.__dict__["forward"] = forward.args[3]


def _inside(reads: Reads, path: str, forward, before, /, *args, **kwargs):
    """Run a layer's forward, in which reads of its own weight are right."""
    if threading.get_ident() != reads.thread:
        return forward(*args, **kwargs)
    reads.running[path] = reads.running.get(path, 0) + 1
    try:
        return forward(*args, **kwargs)
    finally:
        reads.running[path] -= 1


def _is_own(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func is _inside


@cache
def _takes_values(func: Any) -> bool:
    """Return whether an operation makes new tensors of the values that it is given: no view, no write, no number."""
    name, returns = func._schema.name, func._schema.returns
    creates = any(isinstance(r.type, (torch.TensorType, torch.ListType)) and r.alias_info is None for r in returns)
    return creates and not name.endswith(_SHAPE_ONLY)


def _storage(t: Tensor) -> tuple[int, ...]:
    return (t.untyped_storage()._cdata,) if t.layout is torch.strided and torch._C._has_storage(t) else ()


def _in_a_hook_of(module: nn.Module) -> bool:
    """Return whether a hook of the module runs, which watches its weight or sets it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _reader() -> str:
    """Return the function that reads, outside of torch and of this library's core, as text."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is None:
        return "something in torch"
    code = frame.f_code
    return f"{code.co_qualname}, line {frame.f_lineno} of {os.path.basename(code.co_filename)}"


# -- forwards that are watched by themselves ---------------------------------------------------------------------------


@dataclass
class _Running:
    """A forward that is being watched. frame: of its call; error: the one that was being handled when it began."""

    reads: Reads
    module: nn.Module | None = None
    frame: FrameType | None = None
    kind: tuple = ()
    error: BaseException | None = None


class _Now(threading.local):
    running: _Running | None = None


_now = _Now()


class Watch:
    """The hooks of a module around all changed layers. Holds each adapter's layers, not the module."""

    def __init__(self, state: State, layers: dict[str, dict[str, nn.Module]]):
        self.state, self.layers = state, layers
        self.passed: set[tuple] = set()  # kinds of forwards that could not be watched

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling() or self.state.merged is not None:
            return
        names = self.state.arrangement.names if self.state.arrangement else self.state.active
        if not names:
            return
        kind = (type(module).__name__, names, module.training, torch.is_grad_enabled(), *_form(args, kwargs))
        if kind in self.state.watched or kind in self.passed or len(self.state.watched) > _KINDS:
            return
        _heal()
        if _now.running is not None or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
            return
        layers = {p: m for n in names for p, m in self.layers.get(n, {}).items()}
        reads = Reads(layers)
        if _cannot(module, layers) or not reads.open():
            self.passed.add(kind)
            return
        _now.running = _Running(reads, module, sys._getframe(1), kind, sys.exc_info()[1])

    def after(self, module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        if torch.compiler.is_compiling() or (running := _now.running) is None or running.module is not module:
            return
        _now.running = None
        running.reads.close()
        if sys.exc_info()[1] is not running.error:
            return  # the forward failed
        if running.reads.found:
            raise AddendaError(said(running.reads.found))
        self.state.watched.add(running.kind)


def _form(args: tuple, kwargs: dict) -> Iterator[Any]:
    """Yield what tells kinds of calls apart: which arguments, and whether with one token."""
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    yield first is not None and first.dim() > 1 and first.shape[1] == 1
    yield len(args)
    yield tuple((k, v if isinstance(v, bool) else None) for k, v in kwargs.items() if v is not None)


def _cannot(module: nn.Module, layers: dict[str, nn.Module]) -> bool:
    """Return whether this forward cannot be watched: its weights are sharded or replicas, or it is compiled."""
    sharded = any(is_sharded(w) for m in layers.values() if (w := m._parameters.get("weight")) is not None)
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in module.modules())
    return sharded or compiled or getattr(module, "_is_replica", False)


def _heal() -> None:
    """End a watch whose forward was left by an interrupt, behind which no hook runs."""
    if (running := _now.running) is None or running.frame is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not running.frame:
        frame = frame.f_back
    if frame is None:
        _now.running = None
        running.reads.close()


def hook(root: nn.Module, state: State) -> None:
    """Watch forwards of the modules around all changed layers, and stop watching those of earlier adapters."""
    unhook(root)
    owners = owners_of(root)
    layers = {n: _layers(site_at(root, p, owners) for p in r.methods) for n, r in state.records.items()}
    paths = [p for group in layers.values() for p in group]
    if not paths:
        return
    state.watched.clear()
    parents = (p.split(".")[:-1] for p in paths)
    shared_names = takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    module, watch = root, Watch(state, layers)
    for name in [None, *(names[0] for names in shared_names)]:
        module = module if name is None else module.get_submodule(name)
        module.register_forward_pre_hook(watch.before, with_kwargs=True)
        module.register_forward_hook(watch.after, with_kwargs=True, always_call=True)


def unhook(root: nn.Module) -> None:
    """Take the hooks of every `Watch` off the model, and no others."""
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", None), Watch)]:
                del hooks[key]
                for marked in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"):
                    getattr(module, marked).pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


# -- forwards that are watched on purpose ------------------------------------------------------------------------------


def _layers(sites: Iterable[Site]) -> dict[str, nn.Module]:
    """Return the sites' layers that are called with their weight; a raw parameter acts for whoever reads it."""
    return {s.path: s.module for s in sites if s.kind not in (PARAMETER, OUTPUT)}


@contextmanager
def watching(sites: Iterable[Site]) -> Iterator[None]:
    """Raise AddendaError, at the end of a `with` block, where weights of these sites were read past their forward.

    Raises AddendaError naming the sites and who reads them.
    """
    reads = Reads(_layers(sites))
    if not reads.layers or not reads.open():
        yield
        return
    outer, _now.running = _now.running, _Running(reads)
    try:
        yield
    finally:
        _now.running = outer
        reads.close()
    if reads.found:
        raise AddendaError(said(reads.found))


@contextmanager
def unnoticed() -> Iterator[None]:
    """Pause watching for a `with` block in which this library itself reads weights."""
    running = _now.running
    if running is None:
        yield
        return
    running.reads.paused += 1
    try:
        yield
    finally:
        running.reads.paused -= 1


def known_reads(root: nn.Module, state: State) -> str:
    """Return what forwards have shown of the active adapters' weights, for a merge without one; "" without layers."""
    owners = owners_of(root)
    if not _layers(site_at(root, p, owners) for n in state.active for p in state.records[n].methods):
        return ""
    if count := sum(kind[1] == state.active for kind in state.watched):
        return f"no weight is read past its forward in {count} kind(s) of forward since attach"
    return "weights read past their forward: not checked, as no forward has run since attach"


def said(found: dict[str, str]) -> str:
    """Return the message that names these sites, who reads them, and what to do."""
    shown = [f"{path} (by {reader})" for path, reader in list(found.items())[:6]]
    ending = f" … and {len(found) - 6} more" if len(found) > 6 else ""
    first = next(iter(found))
    return (
        f"{len(found)} sites have their weight read past their forward, where the change does not act, though a merge "
        f"would change it: {'; '.join(shown)}{ending}. Leave them out with exclude=, e.g. exclude={[first]!r}; or name "
        f"the matrix itself, targets='{first}.weight', which acts for whoever reads it."
    )
