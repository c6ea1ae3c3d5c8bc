"""What a composition is told of the running forward: which part each token is of, and the residuals of its blocks.

Hooks note it when the model, or the module that reads a residual, is called, in the thread that calls. Where gradient
checkpointing computes a forward again, what it noted then is used (`core.modules.late_backward`).
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from addenda.compose.split import Split
from addenda.core.base.errors import AddendaError
from addenda.core.modules.late_backward import checkpointed, checkpoints, tell, used
from addenda.core.modules.returned import version_of


@dataclass(frozen=True, eq=False)
class Which:
    """Which part each token of a batch is of. numbers: (batch, tokens); None where a Split's sizes say it."""

    numbers: Tensor | None
    parts: int
    blank: Tensor  # (batch, tokens), without data
    _places: dict = field(default_factory=dict)

    def places(self, numbers: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return each part's tokens, counted through the rows, and the order that puts them back.

        numbers: those of this batch, or of a part of it.
        """
        key = numbers.storage_offset(), tuple(numbers.shape), numbers.stride()
        if key not in self._places:
            flat = numbers.flatten()
            found = [(flat == i).nonzero().flatten() for i in range(self.parts)]
            self._places[key] = found, torch.cat(found).argsort()
        return self._places[key]


class _Now(threading.local):
    def __init__(self):
        self.which: dict[Any, Which] = {}
        self.residuals: dict[str, tuple[Tensor, int | None]] = {}


class Seen:
    """What was noted of the forward that runs, for one composition."""

    def __init__(self):
        self.now = _Now()

    def which(self, split: Any) -> Which:
        """Return which part each token is of. Raises AddendaError outside of a call of the whole model."""
        found = used(self, lambda: self.now.which).get(split)
        if found is None:
            raise AddendaError(
                "A Split by rows, by= or pooled= is told of the tokens when the whole model is called. Call the model, "
                "not a layer of it."
            )
        return found

    def residual(self, path: str) -> Tensor:
        """Return the residual of the sum that is changed at this place. Raises AddendaError where none was noted."""
        if path not in self.now.residuals:
            raise AddendaError(
                f"{path}: skip='own' reads the residual of its block, which was not seen in this forward. Run the "
                "whole model; with gradient checkpointing call backward inside the `with` block."
            )
        tensor, version = self.now.residuals[path]
        if version_of(tensor) != version:
            raise AddendaError(f"{path}: the model has changed the residual in place, which skip='own' has to read.")
        return tensor


@contextmanager
def told(
    root: nn.Module, seen: Seen, splits: Iterable[Split], residuals: Mapping[str, nn.Module], acts: Callable[[], bool]
) -> Iterator[None]:
    """Note what a composition must know in every forward of the model inside a `with` block, while acts().

    residuals: by the path of a place the module whose first input is the residual of the sum there.
    """
    splits, handles, modules = list(splits), [], checkpointed(root)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if acts():
            seen.now.which = _noted(module, splits, args, kwargs)

    def mark(module: nn.Module, args: tuple, out: object) -> None:
        if acts() and checkpoints(modules):
            tell(out, seen, seen.now.which)

    def reader(path: str) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if acts():
                tensor = args[0] if args else next(iter(kwargs.values()))
                seen.now.residuals[path] = tensor, version_of(tensor)

        return note

    try:
        if splits:
            handles.append(root.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(root.register_forward_hook(mark))
        for path, module in residuals.items():
            handles.append(module.register_forward_pre_hook(reader(path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        seen.now.which, seen.now.residuals = {}, {}


def _noted(root: nn.Module, splits: list[Split], args: tuple, kwargs: dict) -> dict[Any, Which]:
    inputs = {**dict(zip(_names(root), args, strict=False)), **kwargs}
    shape = _shape(inputs)
    blank = torch.empty(shape, device="meta")
    return {s.key: Which(s.numbers(inputs, shape), len(s.parts), blank) for s in splits}


def _names(root: nn.Module) -> list[str]:
    cls: Any = type(root)
    return [n for n in inspect.signature(cls.forward).parameters if n != "self"]


def _shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    named = [inputs.get("input_ids"), inputs.get("inputs_embeds"), *inputs.values()]
    first = next((t for t in named if isinstance(t, Tensor) and t.dim() > 1), None)
    if first is None:
        raise AddendaError("Split found no tensor (batch, tokens) among the model's arguments.")
    return first.shape[0], first.shape[1]
