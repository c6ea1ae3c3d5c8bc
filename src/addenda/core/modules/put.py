"""Putting another module in the place of one in a model."""

from torch import nn


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a path."""
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module
