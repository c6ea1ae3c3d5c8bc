"""The largest of many numbers by position, alike on every machine: of equal ones those that come first."""

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
