"""Optimizers: plain AdamW, and those that know what an adapter's tensors are. One file each; see `optim.registry`."""

import importlib
import pkgutil

from addenda.optim.registry import build as build
from addenda.optim.registry import known as known
from addenda.optim.registry import named as named
from addenda.optim.registry import optimizer as optimizer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
