"""Layers in which adapters do not act (AdapterDrop, Rücklé et al. 2021, arXiv:2010.11918).

A layer is a transformer block, told by structure and counted from 0 in the model's order; −1 is the last one. "first:3"
and "last:3" are the three at that end. What is in no block, embeddings and heads, is never left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.site.structure import blocks
from addenda.core.state.state import record_of, tensors_at

Some = str | Iterable[int]
Layers = Some | Mapping[str, Some]


def left_out(root: nn.Module, names: Sequence[str], layers: Layers) -> frozenset[int]:
    """Return the ids of the tensors that do not act. Raises AddendaError for layers or adapters that are not there."""
    by_name: Any = layers if isinstance(layers, Mapping) else dict.fromkeys(names, layers)
    if unknown := [n for n in by_name if n not in names]:
        raise AddendaError(
            f"leave_out names {unknown[0]!r}, which takes no part.{nearest(unknown[0], names)} "
            f"Taking part: {', '.join(map(repr, names))}."
        )
    found: set[int] = set()
    paths: list[str] | None = None
    for name, some in by_name.items():
        if isinstance(some, Iterable) and not isinstance(some, str):
            some = tuple(some)
        if some == ():
            continue
        paths = list(blocks(root)) if paths is None else paths
        starts = tuple(f"{paths[i]}." for i in numbers_of(some, len(paths), type(root).__name__))
        exact = {start[:-1] for start in starts}
        for path in record_of(root, name).record.methods:
            if path.startswith(starts) or path.partition("@")[0] in exact:
                found.add(id(tensors_at(root, name, path)))
    return frozenset(found)


def numbers_of(some: Some, count: int, what: str = "model") -> list[int]:
    """Return the layers that are meant of so many. Raises AddendaError for those that are not there."""
    if isinstance(some, str):
        end, _, number = some.partition(":")
        if end not in ("first", "last") or not (number.isascii() and number.isdigit()):
            raise AddendaError(f"leave_out is numbers of layers, 'first:3' or 'last:3'; got {some[:80]!r}.")
        n = int(number)
        wanted = range(n) if end == "first" else range(-1, -n - 1, -1)
    else:
        wanted = some if isinstance(some, Iterable) else (some,)
    made = []
    for i in wanted:
        if type(i) is not int or not -count <= i < count:
            raise AddendaError(
                f"leave_out names layer {i!r}, and this {what} has {count} (transformer blocks), 0 to {count - 1} or "
                f"−{count} to −1."
                if count
                else f"leave_out names layers, and no transformer block is recognised in this {what}."
            )
        made.append(i % count)
    return list(dict.fromkeys(made))
