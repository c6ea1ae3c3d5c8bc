"""The attention implementation: measured for the shapes at hand, or named.

On a CPU the flash kernel behind "sdpa" is slow on short rows, where the plain products of "eager" are faster; on long
rows it is the other way round. So a training step of the frozen base is timed with both. The clock may say another
thing the next time, and the two differ in their last bits; so what it said first is kept in the cache folder, by
machine, model and shape, and equal runs on one machine are computed alike.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import read_json
from addenda.core.disk.cache import cache_folder
from addenda.core.disk.unfinished import unfinished
from addenda.core.file.identity import digest, versions
from addenda.core.modules.borrow import entrance, frozen, gradient_from, training_mode
from addenda.core.modules.ours import is_ours
from addenda.data.encoded import Encoded
from addenda.models.machine import device_of, hardware, processes
from addenda.train.loss import score

NAMES = ("sdpa", "eager")
ROUNDS = 2
FEW = 40  # steps; measuring takes the time of four, and a shorter run may not earn them back


@dataclass(frozen=True)
class Attention:
    """An attention implementation. name: None for a model without a choice; seconds: a step of each, if measured."""

    name: str | None
    seconds: dict[str, float] = field(default_factory=dict)


def current(model: Any) -> str | None:
    """Return the implementation that a transformers model has now; None where it has no choice."""
    has = hasattr(model, "set_attn_implementation")
    return getattr(model.config, "_attn_implementation", None) if has else None


def put(model: Any, name: str | None) -> None:
    """Set the implementation, for good; None: nothing to do. Raises AddendaError where the model has no such one."""
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
    """Use an implementation for the length of a `with` block; the model's own, of each part, come back afterwards."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    put(model, name)
    try:
        yield
    finally:
        for config, own in before:
            if config._attn_implementation != own:
                config._attn_implementation = own


def choose(model: nn.Module, train: Encoded, batch: int, steps: int) -> Attention:
    """Return the implementation for a run, as `settled`; the model keeps its own.

    A run of fewer than 40 steps and one over several processes (which must agree) keep what the model has, unmeasured.
    """
    if steps < FEW or processes() > 1:
        return Attention(current(model))
    return settled(model, train, batch)


def settled(model: nn.Module, train: Encoded, batch: int) -> Attention:
    """Return the implementation measured on this machine for such a model and batch: once, kept for later runs.

    Of runs that measure at the same time the first to write decides. A damaged entry is removed and measured anew.
    Where nothing can be kept, nothing is measured: the model keeps its own, which is the same the next time.
    """
    if (own := current(model)) is None:
        return Attention(None)
    file = cache_folder() / "attention" / f"{_case(model, train, batch)}.json"
    if (known := _kept(file)) is not None:
        return known
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(file, folder=False) as beside:
            beside.write_text(json.dumps(asdict(measure(model, train, batch)), indent=1), encoding="utf-8")
            if _kept(file) is None:
                file.unlink(missing_ok=True)
            try:
                os.link(beside, file)  # unlike a rename it does not replace what another run has written meanwhile
            except FileExistsError:
                pass
            except OSError:  # a disk without links
                os.replace(beside, file)
    except OSError:  # a full disk, or one that cannot be written to
        return _kept(file) or Attention(own)
    return _kept(file) or Attention(own)


def _case(model: nn.Module, train: Encoded, batch: int) -> str:
    """Return what the fastest implementation depends on, as a name."""
    shapes = {k: [list(t.shape), str(t.dtype)] for k, t in train.batch(_long(train.lengths, batch)).items()}
    tensors = [[n, list(p.shape), str(p.dtype), type(p).__name__] for n, p in model.named_parameters()]
    own = [t for t in tensors if not is_ours(t[0])]
    machine = {k: v for k, v in hardware().items() if k in ("cpu", "threads", "gpu")} | {"on": device_of(model).type}
    return digest([type(model).__name__, own, current(model), shapes, train.kind, machine, versions()])[:32]


def _kept(file: Path) -> Attention | None:
    """Read what was measured before; None where it was not, or the file holds anything else."""
    try:
        said = read_json(file)
    except AddendaError:
        return None
    if not isinstance(said, dict) or said.keys() != {"name", "seconds"} or not isinstance(said["seconds"], dict):
        return None
    name, seconds = said["name"], said["seconds"]
    numbers = all(isinstance(v, float) and v > 0 for v in seconds.values())
    return Attention(name, seconds) if numbers and seconds.keys() <= set(NAMES) and name in seconds else None


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
                    loss = score(model, tensors, train.kind, objective=train.objective).mean
                    loss.backward()
                    loss.item()  # waits for a GPU
                    seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - started)
    return Attention(min(seconds, key=seconds.__getitem__) if seconds else own, seconds)


def _long(lengths: Sequence[int], batch: int) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])[len(lengths) // 4 :][:batch]
