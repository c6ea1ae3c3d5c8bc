"""ONNX files, as far as weights need: constants, and which node reads which. No onnx package is needed for that.

A file is one message of Protocol Buffers: fields of a number and a wire type, in any order. Of the schema (onnx.proto3)
only these numbers are used: model 7 graph; graph 1 node, 5 initializer; node 1 input, 2 output, 4 op_type, 5 attribute;
attribute 5 tensor; tensor 1 dims, 2 data_type, 4 float_data, 8 name, 9 raw_data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLOAT = 1  # of data_type


@dataclass(frozen=True)
class Node:
    """An operation: kind, names of what it reads and of what it makes, and the float tensors among its attributes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: tuple[np.ndarray, ...]


def read(path: Path) -> tuple[list[Node], dict[str, np.ndarray]]:
    """Read an ONNX file as (nodes in order, float32 initializers by name). Raises ValueError for any other file."""
    graphs = [part for number, part in _fields(memoryview(path.read_bytes())) if number == 7]
    if len(graphs) != 1:
        raise ValueError(f"{len(graphs)} graphs, one was expected")
    nodes, constants = [], {}
    for number, part in _fields(graphs[0]):
        if number == 1:
            nodes.append(_node(part))
        elif number == 5 and (constant := _tensor(part)) is not None:
            constants[constant[0]] = constant[1]
    return nodes, constants


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    tensors = []
    for number, part in _fields(message):
        if number in texts:
            texts[number].append(bytes(part).decode())
        elif number == 5:
            values = [_tensor(inner) for n, inner in _fields(part) if n == 5]
            tensors += [f[1] for f in values if f is not None]
    return Node("".join(texts[4]), tuple(texts[1]), tuple(texts[2]), tuple(tensors))


def _tensor(message: memoryview) -> tuple[str, np.ndarray] | None:
    """Return (name, values) of a float32 tensor; None for another type."""
    dims, kind, name, values = [], 0, "", memoryview(b"")
    for number, part in _fields(message):
        if number == 1:
            dims += [part] if isinstance(part, int) else _packed(part)
        elif number == 2:
            kind = part
        elif number == 8:
            name = bytes(part).decode()
        elif number in (4, 9):
            values = part
    if kind != FLOAT:
        return None
    return name, np.frombuffer(values, "<f4").reshape(dims)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each field: an int for a varint, the bytes for all else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(message)}")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError(f"a number that does not end at byte {at}")
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _packed(message: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        numbers.append(value)
    return numbers
