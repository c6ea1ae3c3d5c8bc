"""Looked-up rows of a table with sparse changes: nothing is as large as the table, in forward or backward.

    y = W[ids] + Σ Δ[ids],   Δ zero but for K values at sorted flat positions

A row's positions are found by two bisections. The gradient of the values is gathered from that of y, one number for
each entry of a row that was read. Both are operators of torch's own registry, as the number of entries depends on ids:
torch.compile and fake tensors know their shapes all the same. On a GPU that number is read back, once a call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def changed_rows(y: Tensor, ids: Tensor, entries: Sequence[tuple[Tensor, Tensor]], padding: int | None) -> Tensor:
    """Return y (…, n) = W[ids] with every change's rows added, in float32 at least, and rounded once.

    entries: of each change (index, values), K of both, index rising. padding: the id whose row learns nothing.
    """
    total = y.to(torch.promote_types(y.dtype, torch.float32))
    for index, values in entries:
        rows = looked_up(ids, index, values, y.shape[-1], -1 if padding is None else padding)
        total = total + rows.to(total.dtype)
    return total.to(y.dtype)


@torch.library.custom_op("addenda::looked_up", mutates_args=())
def looked_up(ids: Tensor, index: Tensor, values: Tensor, width: int, padding: int) -> Tensor:
    """Return Δ[ids] (…, width) in the dtype of the values."""
    found = values.new_zeros(ids.numel() * width)
    entry, place = _entries(ids, index, width)
    found[place] = values[entry]
    return found.view(*ids.shape, width)


@torch.library.custom_op("addenda::looked_up_gradient", mutates_args=())
def _gradient(ids: Tensor, index: Tensor, gy: Tensor, width: int) -> Tensor:
    """Return the gradient (K) of the values from that of Δ[ids]."""
    entry, place = _entries(ids, index, width)
    return gy.new_zeros(len(index)).index_add_(0, entry, gy.reshape(-1)[place])


def _entries(ids: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return which of the K entries the rows hold, and where each is in Δ[ids], flat; both int64."""
    first = ids.reshape(-1).long() * width
    start = torch.searchsorted(index, first.to(index.dtype))
    count = torch.searchsorted(index, (first + width - 1).to(index.dtype), right=True) - start
    row = torch.repeat_interleave(count)
    entry = torch.arange(len(row), device=row.device) + (start - (count.cumsum(0) - count))[row]
    return entry, row * width + (index[entry].long() - first[row])


@looked_up.register_fake
def _(ids, index, values, width, padding):
    return values.new_empty(*ids.shape, width)


@_gradient.register_fake
def _(ids, index, gy, width):
    return gy.new_empty(len(index))


def _keep(ctx, inputs, output) -> None:
    ids, index, _, ctx.width, ctx.padding = inputs
    ctx.save_for_backward(ids, index)


def _backward(ctx, gy: Tensor):
    ids, index = ctx.saved_tensors
    if ctx.padding >= 0:
        gy = gy.masked_fill((ids == ctx.padding)[..., None], 0.0)
    return None, None, _gradient(ids, index, gy, ctx.width) if ctx.needs_input_grad[2] else None, None, None


looked_up.register_autograd(_backward, setup_context=_keep)
