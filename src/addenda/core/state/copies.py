"""Converting a whole model to another dtype, and putting its own bits back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from addenda.core.modules.ours import is_ours
from addenda.core.packed.tensor import Packed


@contextmanager
def unconverted(root: nn.Module, kept: dict[str, Tensor]) -> Iterator[None]:
    """Give the adapters of a converted model the values that they had before, for a `with` block."""
    ours = {path: values for path, values in kept.items() if is_ours(path)}
    now = {path: t.detach() for path, t in _named(root) if path in ours}
    put_back(root, ours)
    try:
        yield
    finally:
        put_back(root, now)


def changed_by(root: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return, uncopied, the parameters and buffers that `root.to(dtype)` will convert, by path."""
    tensors = {p: t for p, t in _named(root) if (t.is_floating_point() or t.is_complex()) and t.dtype != dtype}
    return {p: t.detach() if isinstance(t, nn.Parameter) else t for p, t in tensors.items()}


def put_back(root: nn.Module, kept: dict[str, Tensor]) -> None:
    """Put the values of `changed_by` back, where their places still exist, on the device where the model is now."""
    for path, values in kept.items():
        owner, _, leaf = path.rpartition(".")
        try:
            module = root.get_submodule(owner)
        except AttributeError:  # of an adapter that was detached meanwhile
            continue
        if (buffer := module._buffers.get(leaf)) is not None:
            module._buffers[leaf] = values.to(buffer.device)
        elif (parameter := module._parameters.get(leaf)) is None:
            continue
        elif isinstance(values, Packed):
            module._parameters[leaf] = nn.Parameter(values.to(parameter.device), requires_grad=False)
        else:
            parameter.data = values.to(parameter.device)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(values.dtype)


def _named(root: nn.Module) -> list[tuple[str, Tensor]]:
    return [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
