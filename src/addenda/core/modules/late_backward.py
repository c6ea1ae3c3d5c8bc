"""The values that a forward used, kept for when a part of it is computed again in backward.

Gradient checkpointing runs layers a second time during backward, when the call that they were part of is over: another
adapter may act by then, and nobody knows which tokens were padding. So what a forward used is kept with the checkpoint
that will run it again (`used`), or, where that cannot be seen (reentrant checkpoints run without a graph), the backward
is told when it passes through what the forward returned (`tell`). Where neither was, a `History` says whether a value
is another one by now: what is computed again then would be silently wrong.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.autograd.function import BackwardCFunction

_top = getattr(_autograd, "_top_saved_tensors_default_hooks", lambda _: None)  # since torch 2.8
_frames: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()  # of checkpoints whose graph still lives
_NOTED = 64  # values of one thread: a forward has its backward before as many others come


class _Told(threading.local):
    def __init__(self):
        self.of: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()  # the running backward, and its value


_told = _Told()


def _free(hook: Any, name: str) -> Any:
    """Return a variable that a function closes over, or None."""
    function = inspect.unwrap(hook)
    code = getattr(function, "__code__", None)
    if code is None or name not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index(name)].cell_contents


def in_backward() -> bool:
    """Return whether this code runs inside of a backward, as a forward that is computed again does."""
    return torch._C._current_graph_task_id() != -1


def first() -> bool:
    """Return whether the running forward is surely not one that is, or will be, computed again."""
    return _top(False) is None and torch._C._current_graph_task_id() == -1


def used(of: Any, now: Callable[[], Any]) -> Any:
    """Return now(), a forward's value of something; where that forward is computed again, the value it had then.

    of: what it is a value of, an object that lives as long as the model.
    """
    hooks = _top(False)
    if in_backward():
        reference = None if hooks is None else _free(hooks[0], "target_frame_ref")
        frame = None if reference is None else reference()
        values = {} if frame is None else _frames.get(frame, {})
        if of in values:
            return values[of]
        value = told(of)
        return now() if value is None else value
    value = now()
    if hooks is not None and (frame := _free(hooks[0], "frame")) is not None:
        _frames.setdefault(frame, {}).setdefault(of, value)
    return value


def told(of: Any) -> Any:
    """Return the value that `tell` last gave the running backward for this object, or None."""
    task, value = _told.of.get(of, (-1, None))
    return value if task != -1 and task == torch._C._current_graph_task_id() else None


def tell(out: Any, of: Any, value: Any) -> None:
    """Give a value to the backward that reaches these outputs, for the parts of their forward it computes again."""

    def note(grad: Tensor) -> None:
        _told.of[of] = (torch._C._current_graph_task_id(), value)

    for t in _tensors(out):
        if t.requires_grad:
            t.register_hook(note)


class History:
    """What a value was when, for each thread or task that has set it, by autograd's count of the nodes it has made."""

    def __init__(self):
        self.of: WeakKeyDictionary[Any, list[tuple[int, Any]]] = WeakKeyDictionary()

    def note(self, value: Any) -> None:
        """Note that the value is this one for the caller's next nodes."""
        noted = self.of.setdefault(_whose(), [])
        if not noted or noted[-1][1] != value:
            noted.append((_autograd._get_sequence_nr(), value))
            del noted[:-_NOTED]

    def then(self) -> Any:
        """Return the value at the forward of the checkpoint that runs again now; None where that cannot be told."""
        node = torch._C._current_autograd_node() if in_backward() else None
        if not isinstance(node, BackwardCFunction):  # a hook's own forward is none that runs again
            return None
        noted = self.of.get(_whose())
        if noted is None and len(self.of) == 1:  # the thread of a device, which runs the backward of the only other one
            (noted,) = self.of.values()
        return next((value for at, value in reversed(noted or ()) if at <= node._sequence_nr()), None)


def _whose() -> Any:
    task = None if asyncio._get_running_loop() is None else asyncio.current_task()
    return threading.current_thread() if task is None else task


def checkpointed(root: nn.Module) -> list[nn.Module]:
    """Return the modules that have transformers' flag for gradient checkpointing."""
    return [m for m in root.modules() if hasattr(m, "gradient_checkpointing")]


def checkpoints(modules: list[nn.Module]) -> bool:
    """Return whether a forward that runs now checkpoints one of these modules."""
    return torch.is_grad_enabled() and any(m.gradient_checkpointing is True and m.training for m in modules)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
