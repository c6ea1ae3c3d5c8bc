"""The attention implementation: measured for the shapes at hand, or named.

On a CPU the flash kernel behind "sdpa" is slow on short rows, where the plain products of "eager" are faster; on long
rows it is the other way round. So a training step of the frozen base is timed with both.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from addenda.core.borrow import entrance, frozen, gradient_from, training_mode
from addenda.core.errors import AddendaError
from addenda.train.encoded import Encoded
from addenda.train.loss import score
from addenda.train.machine import device_of, processes

NAMES = ("sdpa", "eager")
ROUNDS = 2
FEW = 40  # steps; measuring takes the time of four, and a shorter run may not earn them back


@dataclass(frozen=True)
class Attention:
    """name: the implementation, None for a model without a choice; seconds: of one step with each, if measured."""

    name: str | None
    seconds: dict[str, float] = field(default_factory=dict)


def current(model: Any) -> str | None:
    """The implementation that a transformers model has now; None where it has no choice."""
    has = hasattr(model, "set_attn_implementation")
    return getattr(model.config, "_attn_implementation", None) if has else None


def put(model: Any, name: str | None) -> None:
    """Set it, for good. None: nothing to do. Raises AddendaError where the model has no such implementation."""
    if name is None or name == current(model):
        return
    why = f"{type(model).__name__} has no choice of attention"
    if hasattr(model, "set_attn_implementation"):
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            why = str(error)
    if current(model) != name:
        raise AddendaError(f"attention={name!r} cannot be: {why}. Leave it at 'auto', or name 'sdpa' or 'eager'.")


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """The implementation for the length of a `with` block; the model's own comes back afterwards."""
    before = current(model)
    put(model, name)
    try:
        yield
    finally:
        put(model, before)


def choose(model: nn.Module, train: Encoded, batch: int, steps: int) -> Attention:
    """The fastest implementation for a run; the model keeps its own.

    A run of fewer than 40 steps and one over several processes (which must agree) keep what the model has, unmeasured.
    """
    if steps < FEW or processes() > 1:
        return Attention(current(model))
    return measure(model, train, batch)


def measure(model: nn.Module, train: Encoded, batch: int) -> Attention:
    """Time forward and backward of the frozen base with each implementation; the model keeps its own.

    The batch is made of long examples, but not of the longest quarter. The implementations take turns, and the fastest
    of two times counts: the machine may be shared.
    """
    if (own := current(model)) is None:
        return Attention(None)
    rows = _long(train.lengths, batch)
    tensors = {k: t.to(device_of(model)) for k, t in train.batch(rows).items()}
    seconds: dict[str, float] = {}
    with frozen(model), training_mode(model, True), gradient_from(*entrance(model)):
        for _ in range(ROUNDS):
            for name in NAMES:
                with suppress(AddendaError, torch.OutOfMemoryError), using(model, name):
                    started = time.perf_counter()
                    loss = score(model, tensors, train.kind).mean
                    loss.backward()
                    loss.item()  # waits for a GPU
                    seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - started)
    return Attention(min(seconds, key=seconds.__getitem__) if seconds else own, seconds)


def _long(lengths: Sequence[int], batch: int) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])[len(lengths) // 4 :][:batch]
