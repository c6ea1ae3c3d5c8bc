"""Forwards in which every example has an adapter of its own: how a layer computes inside `addenda.per_example`.

Low-rank adapters share one base product, and their thin products run as two batched ones; methods that scale and add
entries share it too (Wen & Chaudhuri 2023, arXiv:2312.05677, has both forms). For any other method, and for changes of
activations, the batch is split by adapter and put together. Gradients reach the adapters that a batch uses, and no
other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.execute import execute, thin
from addenda.core.forward.mixed import Mixed
from addenda.core.method.contract import Base
from addenda.core.site.kinds import Kind


@dataclass(frozen=True, eq=False)
class PerExample(Mixed):
    """A composition with one adapter for each example: the tensors of all of them, and which one each example takes."""

    which: Tensor  # (batch); -1: none

    def layer(self, module: nn.Module, original: type, kind: Kind, x: Tensor, *rest, **options) -> Tensor:
        """Return the layer's output, each example (the first dimension of x) with its own adapter."""
        indices = self._fitting(module, x)
        tensors = self.tensors
        if kind.dense and x.dim() > 1 and all(thin(t.method) for t in tensors):
            return _added(module, kind, tensors, indices, x, original.forward(module, x, *rest, **options))
        first = tensors[0].method
        if kind.dense and x.dim() > 1 and first.elementwise and all(t.method == first for t in tensors):
            return _together(lambda x: original.forward(module, x, *rest, **options), module, kind, tensors, indices, x)
        return _split(lambda x, t, _: execute(module, original, kind, (t,), x, *rest, **options),
                      lambda x: original.forward(module, x, *rest, **options), tensors, indices, x)  # fmt: skip

    def act(self, one: Callable, v: Tensor, back: bool = False) -> Tensor:
        indices = self._fitting(None, v)
        return _split(lambda v, t, rows: one(t, v, lambda z: z[rows]), lambda v: v, self.tensors, indices, v)

    def _fitting(self, module: nn.Module | None, x: Tensor) -> Tensor:
        if len(x) != len(self.which):
            place = "a change of activations" if module is None else f"a {type(module).__name__}"
            raise AddendaError(
                f"per_example names an adapter for each of {len(self.which)} examples, and {place} got {len(x)} rows: "
                "the first dimension of every adapted layer's input must be the batch."
            )
        return self.which.to(x.device)


def _added(module: nn.Module, kind: Kind, tensors: tuple, indices: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return y + s x Aᵀ Bᵀ with the A and B of each example: two batched products over (batch, tokens, …)."""
    weight = module._parameters["weight"]
    assert weight is not None
    shape = kind.to_matrix(weight).shape
    pairs = [t.method.factors(t.tensors(), (shape[0], shape[1])).pair() for t in tensors]
    rank = max(A.shape[0] for _, A in pairs)
    A = torch.stack([F.pad(A, (0, 0, 0, rank - A.shape[0])) for _, A in pairs]).to(y.dtype)
    B = torch.stack([F.pad(B, (0, rank - B.shape[1])) for B, _ in pairs]).to(y.dtype)
    rows = torch.nonzero(indices >= 0).flatten()
    everyone = len(rows) == len(indices)
    picks = indices if everyone else indices[rows]
    inputs = (x if everyone else x[rows]).to(y.dtype).flatten(1, -2) if x.dim() > 2 else x[rows, None].to(y.dtype)
    drop = [t.method.dropout if t.training else 0.0 for t in tensors]
    if any(drop):
        share = inputs.new_tensor(drop)[picks].view(-1, 1, 1)
        inputs = inputs * (torch.rand_like(inputs) >= share) / (1 - share)
    one_each = len(picks) == len(tensors) and bool((picks == torch.arange(len(picks), device=picks.device)).all())
    if not one_each:
        A, B = A[picks], B[picks]
    change = torch.bmm(torch.bmm(inputs, A.transpose(1, 2)), B.transpose(1, 2))
    change = change.view(len(picks), *y.shape[1:])
    return y + change if everyone else y.index_add(0, rows, change)


def _together(base: Callable, module: nn.Module, kind: Kind, tensors: tuple, indices: Tensor, x: Tensor) -> Tensor:
    """Run one `apply` for all examples, each with its own tensors; one without an adapter gets the base's output."""
    rows = torch.nonzero(indices >= 0).flatten()
    sets = [t.tensors() for t in tensors]
    picks = indices[rows]
    p = {k: torch.stack([s[k] for s in sets])[picks] for k in sets[0]}
    p = {k: t.view(len(picks), *[1] * (x.dim() - 2), *t.shape[1:]) for k, t in p.items()}
    weight = kind.to_matrix(module._parameters["weight"].detach())
    y = tensors[0].method.apply(x[rows], Base(base, weight, getattr(module, "bias", None)), p)
    if len(rows) == len(indices):
        return y
    base_rows = torch.nonzero(indices < 0).flatten()
    return torch.cat([y, base(x[base_rows])])[torch.cat([rows, base_rows]).argsort()]


def _split(one: Callable, base: Callable, tensors: tuple, indices: Tensor, x: Tensor) -> Tensor:
    """Run each adapter's examples through the layer on their own, and put the outputs together in order."""
    parts, places = [], []
    for k in indices.unique().tolist():
        rows = torch.nonzero(indices == k).flatten()
        parts.append(one(x[rows], tensors[k], rows) if k >= 0 else base(x[rows]))
        places.append(rows)
    return torch.cat(parts)[torch.cat(places).argsort()]
