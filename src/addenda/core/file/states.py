"""States in a safetensors file, no pickle: what optimizers, schedules and random generators give as `state_dict()`.

A state is made of dicts, lists, tuples, tensors, numbers, text, True, False and None, however deep. Tensors are the
file's tensors; all else is its one entry of metadata, JSON in which nothing is lost:

    3, 0.1, "text", true, null, [1, 2]      themselves: whole numbers of up to 300 digits, floats to the last bit
    {"float": "inf"}                        inf, -inf and nan
    {"tuple": [1, 2]}
    {"dict": [[key, value], …]}             in their order; keys are numbers, text, True, False, None, tuples
    {"tensor": "0"}                         the tensor of that name
    {"tensor": "1", "order": [1, 0]}        one whose dimensions lie in another order in memory: so they do again

A type of a library's own is written as the dict, list, tuple or number that it is, and comes back as that.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import parse_json, reading, shown
from addenda.core.file.container import opened, write

ENTRY = "state"  # of the metadata
_DEEP = 200
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def write_state(path: Path, state: Any, what: str = "state") -> None:
    """Write a state to a file, whole or not at all. what: whose it is, for an error.

    Raises AddendaError where the state holds something else than the module says, with its place.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_Writer(tensors, what).plain(state, ""), allow_nan=False, separators=(",", ":"))
    try:
        _Reader(tensors).value(parse_json(text), 0)
    except (ValueError, RecursionError) as error:
        raise AddendaError(
            f"The {what} could not be read again ({label(error, 300)}), so it is not written. It has too many values "
            "that are no tensors, a number of hundreds of digits, half a character, or is nested too deeply."
        ) from None
    write(path, {ENTRY: text}, tensors)


def read_state(path: Path) -> Any:
    """Read what `write_state` wrote, tensors on the CPU. Raises AddendaError for any other file."""
    try:
        with reading(path), opened(path) as file:
            text = file.metadata.get(ENTRY)
            if text is None:
                raise ValueError(f"a safetensors file without the entry {ENTRY!r}")
            tensors = file.tensors()
        reader = _Reader(tensors)
        state = reader.value(parse_json(text, room=file.size), 0)
        if unused := sorted(set(tensors) - reader.used):
            raise ValueError(f"tensors that nothing names: {unused[:4]}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AddendaError(
            f"{shown(path)} is damaged, or no state that addenda wrote: {type(error).__name__}: {label(error, 300)}."
        ) from None
    return state


def keep(path: Path, state: Any, what: str = "state") -> None:
    """Write a state that can be made again; where the disk does not take it, nothing is kept, and nothing said."""
    with suppress(OSError):
        write_state(path, state, what)


def kept(path: Path, sound: Callable[[Any], bool]) -> Any:
    """Return a state that was kept, marked as used; None where there is none.

    sound: whether it is what is expected, at which it may fail. One that is not, or is damaged, is removed.
    """
    if not path.is_file():
        return None
    try:
        state = read_state(path)
        fine = sound(state)
    except (AddendaError, KeyError, TypeError, AttributeError):
        fine, state = False, None
    with suppress(OSError):
        os.utime(path) if fine else path.unlink()
    return state if fine else None


class _Writer:
    """Puts a state's tensors aside, and returns the rest as JSON has it."""

    def __init__(self, tensors: dict[str, Tensor], what: str):
        self.tensors, self.what = tensors, what
        self.names: dict[int, tuple[Tensor, dict]] = {}  # by id; the tensor too, so that no other takes its id

    def plain(self, value: Any, at: str) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, Tensor):
            return self.tensor(value, at)
        if isinstance(value, dict):
            return {"dict": [[self.key(k, at), self.plain(v, f"{at}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [self.plain(v, f"{at}.{i}") for i, v in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        raise self.error(type(value).__name__, at)

    def key(self, value: Any, at: str) -> Any:
        if not _is_key(value):
            raise self.error(f"a key of type {type(value).__name__}", at)
        return self.plain(value, at)

    def tensor(self, value: Tensor, at: str) -> dict:
        if id(value) in self.names:
            return self.names[id(value)][1]
        if type(value.data) is not Tensor or value.layout != torch.strided or value.dtype.is_complex:
            raise self.error(f"a {type(value.data).__name__} of {value.dtype}", at)
        order = _order(value)
        name = str(len(self.tensors))
        self.tensors[name] = value.detach().permute(order)
        entry: dict[str, Any] = {"tensor": name}
        if order != sorted(order):
            entry["order"] = order
        self.names[id(value)] = (value, entry)
        return entry

    def error(self, found: str, at: str) -> AddendaError:
        return AddendaError(
            f"The {self.what} holds {found} at {at.removeprefix('.') or 'its top'}, which no checkpoint can hold: "
            "these have no pickles. What can be: dicts, lists, tuples, tensors, numbers, text, True, False and None."
        )


def _order(value: Tensor) -> list[int]:
    """Return the dimensions as they lie in memory, where that is all there is to it; else in their own order."""
    order = sorted(range(value.dim()), key=lambda i: -value.stride(i))
    return order if value.permute(order).is_contiguous() and not value.is_contiguous() else list(range(value.dim()))


class _Reader:
    """Builds a state again from JSON and tensors."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.used = tensors, set()

    def value(self, raw: Any, depth: int) -> Any:
        if depth > _DEEP:
            raise ValueError("nested too deeply")
        if isinstance(raw, list):
            return [self.value(v, depth + 1) for v in raw]
        if not isinstance(raw, dict):
            return raw
        kind, held = next(iter(raw.items()), ("nothing", None))
        if set(raw) - {kind} - ({"order"} if kind == "tensor" else set()):
            raise ValueError(f"an object of {sorted(raw)[:4]}")
        if kind == "float" and held in _FLOATS:
            return _FLOATS[held]
        if kind == "tuple" and isinstance(held, list):
            return tuple(self.value(v, depth + 1) for v in held)
        if kind == "dict" and isinstance(held, list):
            return self.pairs(held, depth)
        if kind == "tensor" and isinstance(held, str):
            return self.tensor(held, raw.get("order"))
        raise ValueError(f"an object of {kind!r}")

    def pairs(self, held: list, depth: int) -> dict:
        made = {}
        for pair in held:
            if not (isinstance(pair, list) and len(pair) == 2):
                raise ValueError("a dict wants pairs")
            key = self.value(pair[0], depth + 1)
            if not _is_key(key):
                raise ValueError(f"a {type(key).__name__} for a key")
            if key in made:
                raise ValueError(f"the key {key!r} twice")
            made[key] = self.value(pair[1], depth + 1)
        return made

    def tensor(self, name: str, order: Any) -> Tensor:
        self.used.add(name)
        held = self.tensors[name]
        if held.dtype.is_complex:
            raise ValueError(f"a tensor of {held.dtype}")
        if order is None:
            return held
        if not (isinstance(order, list) and sorted(order) == list(range(held.dim()))):
            raise ValueError(f"dimensions in the order {order!r}")
        return held.permute([order.index(i) for i in range(len(order))])


def _is_key(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_key, value))
    return value is None or isinstance(value, bool | int | float | str)
