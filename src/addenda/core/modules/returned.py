"""What a custom autograd function returns: an output that the caller may change in place, as a torch layer's.

torch refuses to change a view in place that was made inside such a function, and products make views where the input
has more than two dimensions. So a function returns rows, and `like` makes the view outside; where it cannot, `returned`
hands out the same memory as no view. And backward must not want what the caller has without asking `Unchanged` first.
"""

from typing import Any

import torch
from torch import Tensor


def returned(y: Tensor) -> Tensor:
    """Return y, made in a custom function's forward and held by nobody else, as no view of anything, without a copy."""
    return y.data


def like(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows (tokens, width) with the leading dimensions of x."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[-1])


class Unchanged:
    """A check of whether a tensor was changed in place since: it shares the tensor's version, none of its memory."""

    def __init__(self, y: Tensor):
        self.alias: Any = y.detach()
        self.alias.data = y.new_empty(0)
        self.version = y._version

    def __bool__(self) -> bool:
        return self.alias._version == self.version


def version_of(x: Any) -> int | None:
    """Return how often x was changed in place; None where nobody counts: no tensor, inference mode, a compiler."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.is_inference():
        return None
    return x._version
