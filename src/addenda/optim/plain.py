"""The optimizers that a run can name. The only place that imports bitsandbytes (the extra `addenda[bitsandbytes]`).

8-bit AdamW keeps its two moments in 8 bits a number (tensors under 4,096 numbers stay in float32); the paged form lets
them move to the CPU's memory when a GPU's is full.
"""

from collections.abc import Callable

import torch

from addenda.core.adapter import Adapter
from addenda.core.errors import AddendaError, nearest

Optimizers = Callable[[Adapter, float, float], torch.optim.Optimizer]  # (adapter, rate, weight_decay)


def adamw(adapter: Adapter, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW over the adapter's trainable tensors, fused where torch can."""
    live = [p for p in adapter.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in live)
    return torch.optim.AdamW(live, lr=rate, weight_decay=weight_decay, fused=fused)


def _bitsandbytes(name: str, device: torch.device) -> Optimizers:
    paged = name.startswith("paged")
    if paged and device.type == "cpu":
        raise AddendaError(f"{name!r} lets a GPU's memory overflow, and the model is on the CPU. Take 'adamw-8bit'.")
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise AddendaError(
            f"optimizer={name!r} needs bitsandbytes ({error}). pip install 'addenda[bitsandbytes]', or take 'adamw'."
        ) from None
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit

    def make(adapter: Adapter, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        return kind([p for p in adapter.parameters() if p.requires_grad], lr=rate, weight_decay=weight_decay)

    return make


NAMES = ("adamw", "adamw-8bit", "paged-adamw-8bit")


def named(optimizer: str | Optimizers, device: torch.device) -> tuple[str, Optimizers]:
    """(name, function) of a name, or of a function (adapter, rate, weight_decay) -> torch optimizer.

    Raises AddendaError for an unknown name, without bitsandbytes, and for a device that the optimizer is not for.
    """
    if not isinstance(optimizer, str):
        return getattr(optimizer, "__qualname__", type(optimizer).__name__), optimizer
    if optimizer not in NAMES:
        raise AddendaError(
            f"optimizer must be {', '.join(map(repr, NAMES))} or a function, got {optimizer!r}."
            f"{nearest(optimizer, NAMES)}"
        )
    return optimizer, adamw if optimizer == "adamw" else _bitsandbytes(optimizer, device)
