"""Positions in a matrix: the largest entries, alike on every machine, and the dtype that positions are kept in."""

import torch
from torch import Tensor


def largest(score: Tensor, count: int) -> Tensor:
    """Return the sorted flat positions (count, int64) of the largest entries; of equal ones those that come first."""
    flat = score.flatten()
    if flat.is_meta:  # for a template: no values to compare
        return flat.new_empty(count, dtype=torch.int64)
    least = torch.topk(flat, count, sorted=False).values.min()
    above = torch.nonzero(flat > least).flatten()
    level = torch.nonzero(flat == least).flatten()[: count - len(above)]
    return torch.cat([above, level]).sort().values


def narrow(positions: Tensor, size: int) -> Tensor:
    """Return flat positions in a matrix of so many entries as int32, or as int64 where int32 does not reach."""
    return positions.to(torch.int32 if size <= 2**31 else torch.int64)
