"""Which adapters act at a module, and for whom: the model's own state, and the `with` blocks of threads and tasks.

`switch` sets the model's state, and every thread sees it. `per_example`, `composed` and `disabled` are blocks of the
calling context (`contextvars`): a thread that was started inside one begins outside of it, an asyncio task inside, as
does what runs in `contextvars.copy_context()`. Outside of blocks all this costs a module a look at two attributes.

A forward reads what acts module by module, so what acts for all may only change between forwards: `alone` refuses a
change while another thread runs a forward of the model, and holds back those that begin meanwhile.

torch.compile cannot read a context. A compiled forward knows the blocks that were opened in its own thread. Where
nothing acts, it runs the graph of what acted last, on tensors that change nothing (`core.forward.still`).
"""

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.tensors import SiteTensors

P = ParamSpec("P")
R = TypeVar("R")


class Acts(Protocol):
    """A module on which something may act: its `Slots`."""

    def acting(self) -> "Acting": ...


@dataclass(eq=False)
class Acting:
    """The adapters that act at one module. Nobody changes one: another takes its place."""

    live: dict[str, tuple[SiteTensors, ...]] = field(default_factory=dict)  # by parameter, in the order of activation
    each: dict[str, Mixed] = field(default_factory=dict)  # in blocks, in the place of `live`
    readers: int = 0  # how many changes elsewhere read this module's input in a forward
    undoes: "tuple[Acts, ...]" = ()  # whose changes are undone in what this module reads
    mark: Any = None  # of the arrangement: names of the adapters, or the number of a block

    def at(self, parameter: str) -> tuple[SiteTensors, ...]:
        """Return the tensors whose change may take part in a forward."""
        return self.each[parameter].tensors if parameter in self.each else self.live.get(parameter, ())


class Here(threading.local):
    """A module's state in one thread: that of the running forward, and for compiled ones the block around them."""

    def __init__(self):
        self.acting: Acting | None = None
        self.seen: Tensor | None = None  # the module's input, until the last of its readers has been
        self.version: int | None = None  # of that input when it came, see `core.modules.returned`
        self.waiting = 0  # how many of them are still to come
        self.now: dict[tuple[str, bool], Tensor] | None = None  # effective raw parameters
        self.group: dict[str, tuple[SiteTensors, ...]] | None = None  # what acts at them, for a group of rows alone


class _Tasks(threading.local):
    def __init__(self):
        self.blocks = 0  # open ones in this thread that belong to asyncio's tasks


@dataclass(eq=False)
class Block:
    """A `with` block, with who opened it and whether it is closed. A copied context may still be in it then."""

    home: tuple = ()
    closed: bool = False
    number: int = field(default_factory=itertools.count(1).__next__)

    def over(self) -> bool:
        return self.closed and self.is_callers

    @property
    def is_callers(self) -> bool:
        """Whether the calling thread, or task, has opened it."""
        return self.home == _whom()


Blocks = WeakKeyDictionary[Any, Acting]
_around: ContextVar[tuple[Block, ...]] = ContextVar("addenda_blocks", default=())  # the innermost last
tasks = _Tasks()
lock = threading.RLock()  # of whoever changes what acts, for all or in a block


class _Gate:
    closed = False


gate = _Gate()


class _Compiled:
    seen = False


compiled = _Compiled()  # whether a forward of this process was ever compiled


@torch.compiler.assume_constant_result
def note_compiled() -> None:
    """Note that a forward is compiled: torch calls this when it traces one, and never when it runs it."""
    compiled.seen = True


def _task() -> Any:
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def _whom() -> tuple:
    return threading.get_ident(), _task()


def blocks() -> tuple[Block, ...]:
    """Return the blocks around the running code, the innermost last."""
    return _around.get()


@contextmanager
def inside(block: Block) -> Iterator[None]:
    """Put the calling context in the block for the length of a `with` statement."""
    outer, block.home = _around.get(), _whom()
    _around.set((*outer, block))
    tasked = block.home[1] is not None
    tasks.blocks += tasked
    try:
        yield
    finally:
        block.closed = True
        tasks.blocks -= tasked
        remaining = _around.get()
        if block not in remaining and any(b not in remaining for b in outer):  # a switch in here has left all of them
            remaining = outer
        _around.set(tuple(b for b in remaining if b is not block and not b.over()))


def leave(some: Iterable[Block]) -> None:
    """Take the calling context out of these blocks until the innermost that it was in ends."""
    dropped = list(some)
    _around.set(tuple(b for b in _around.get() if b not in dropped))


def enter(around: tuple[Block, ...]) -> None:
    """Put the calling context in these blocks again, as far as they have not ended."""
    _around.set(tuple(b for b in around if not b.over()))


def wait() -> None:
    """Wait until nobody changes what acts for all."""
    with lock:
        pass


@contextmanager
def alone(root: nn.Module, what: str) -> Iterator[None]:
    """Hold off forwards of the model in other threads. Raises AddendaError where one runs at the start."""
    with lock:
        outer, gate.closed = gate.closed, True
        try:
            if not outer and (name := _running(root)) is not None:
                raise AddendaError(
                    f"The thread {name!r} runs a forward of this {type(root).__name__}, which would go on with another "
                    f"adapter halfway: {what} between forwards, or use per_example, composed or disabled, which act "
                    "for the calling thread alone."
                )
            yield
        finally:
            gate.closed = outer


def between_forwards(what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose first argument is a model to run inside of `alone`."""

    def wrapped(change: Callable[P, R]) -> Callable[P, R]:
        @wraps(change)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with alone(cast(nn.Module, args[0] if args else kwargs["model"]), what):
                return change(*args, **kwargs)

        return call

    return wrapped


_CALLS = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


def _running(root: nn.Module) -> str | None:
    """Return the name of another thread inside a call of the model, a part of it, or a module around it; or None."""
    names = {t.ident: t.name for t in threading.enumerate()}
    parts: set[int] = set()
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        while frame is not None:
            if frame.f_code in _CALLS:
                module = frame.f_locals.get("self")
                parts = parts or {id(m) for m in root.modules()}
                if isinstance(module, nn.Module) and (id(module) in parts or any(m is root for m in module.modules())):
                    return names.get(ident, str(ident))
            frame = frame.f_back
    return None
