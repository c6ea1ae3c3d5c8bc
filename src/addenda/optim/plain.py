"""AdamW, with moments of 8 bits too: the only place that imports bitsandbytes (the extra `addenda[bitsandbytes]`).

8-bit AdamW keeps its two moments in 8 bits a number (tensors under 4,096 numbers stay in float32); the paged form lets
them move to the CPU's memory when a GPU's is full.

Weight decay leaves trained copies of vectors alone (gains of norms, biases), here and in every other optimizer of ours.
"""

import torch

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.optim.pairs import by_decay, can_fuse, trained
from addenda.optim.registry import optimizer


@optimizer("adamw", paper="Loshchilov & Hutter 2017, arXiv:1711.05101")
def adamw(adapter: Adapter, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW over the adapter's trainable tensors, fused where torch can."""
    live = trained(adapter)
    groups = by_decay(adapter, live, weight_decay)
    return torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay, fused=can_fuse(live))


@optimizer("adamw-8bit", paper="Dettmers et al. 2021, arXiv:2110.02861")
def adamw_8bit(adapter: Adapter, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits a number."""
    live = trained(adapter)
    return _bitsandbytes("adamw-8bit").optim.AdamW8bit(
        by_decay(adapter, live, weight_decay), lr=rate, weight_decay=weight_decay
    )


@optimizer("paged-adamw-8bit", paper="Dettmers et al. 2023, arXiv:2305.14314")
def paged_adamw_8bit(adapter: Adapter, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """The same, with moments that move to the CPU's memory when a GPU's is full."""
    live = trained(adapter)
    if live and live[0].device.type == "cpu":
        raise AddendaError(
            "'paged-adamw-8bit' lets a GPU's memory overflow, and the model is on the CPU. Take 'adamw-8bit'."
        )
    return _bitsandbytes("paged-adamw-8bit").optim.PagedAdamW8bit(
        by_decay(adapter, live, weight_decay), lr=rate, weight_decay=weight_decay
    )


def _bitsandbytes(name: str):
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise AddendaError(
            f"optimizer={name!r} needs bitsandbytes ({error}). pip install 'addenda[bitsandbytes]', or take 'adamw'."
        ) from None
    return bitsandbytes
