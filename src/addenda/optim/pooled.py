"""AdamW with a rate of its own for what all sites train together, as VB-LoRA's bank (Li et al. 2024, arXiv 2405.15179).

    rate of pooled tensors = ratio · rate        everything else, heads too, at rate

The paper trains the logits at 1e-2 and the bank at 1e-3. A pooled tensor gets a gradient from every site, so its step
should be the smaller one. With ratio=1 it is AdamW, bit for bit.

Cost: none beyond AdamW.
"""

import torch

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.optim.pairs import by_decay, can_fuse, trained
from addenda.optim.registry import optimizer


@optimizer("pooled-adamw", paper="Li et al. 2024, arXiv:2405.15179")
def pooled_adamw(
    adapter: Adapter, rate: float, weight_decay: float = 0.0, *, ratio: float = 0.1
) -> torch.optim.Optimizer:
    """AdamW with a lower rate for tensors that all sites share: ratio times that of all others."""
    if not ratio > 0:
        raise AddendaError(f"pooled-adamw wants a ratio above 0, got {ratio}.")
    pooled = [p for _, pool in adapter.pools() for p in pool.parameters() if p.requires_grad]
    if not pooled:
        raise AddendaError(
            f"'pooled-adamw' has a rate for tensors that all sites train together, and adapter {adapter.name!r} "
            f"({adapter.kinds}) trains none. Take 'adamw'."
        )
    rest = trained(adapter, pooled)
    groups = [*by_decay(adapter, rest, weight_decay, lr=rate), {"params": pooled, "lr": rate * ratio}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=rate, weight_decay=weight_decay, fused=can_fuse(pooled + rest)
    )
