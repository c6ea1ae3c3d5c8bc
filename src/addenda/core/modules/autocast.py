"""Autocast, asked only for kinds of devices that it knows: torch raises for others, as for "meta"."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp import is_autocast_available


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which autocast runs products on this kind of device now; None where it is off."""
    if not (is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager:
    """Inside, products on this kind of device run in the dtypes of their arguments."""
    return switched_off(device, autocast_dtype(device))


def switched_off(device: str, dtype: torch.dtype | None) -> AbstractContextManager:
    """The same, where `autocast_dtype` has been asked already."""
    return nullcontext() if dtype is None else torch.autocast(device, enabled=False)
