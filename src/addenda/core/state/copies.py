"""A whole model in another dtype, and its own bits again afterwards."""

import torch
from torch import Tensor, nn

from addenda.core.packed.tensor import Packed


def changed_by(root: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters and buffers, by path, that `root.to(dtype)` will convert, as they are. Nothing is copied."""
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    found = {p: t for p, t in named if (t.is_floating_point() or t.is_complex()) and t.dtype != dtype}
    return {p: t.detach() if isinstance(t, nn.Parameter) else t for p, t in found.items()}


def put_back(root: nn.Module, kept: dict[str, Tensor]) -> None:
    """The values of `changed_by` in their places, where these are still there; on the device where the model is now."""
    for path, values in kept.items():
        owner, _, leaf = path.rpartition(".")
        try:
            module = root.get_submodule(owner)
        except AttributeError:  # of an adapter that was detached meanwhile
            continue
        if (buffer := module._buffers.get(leaf)) is not None:
            module._buffers[leaf] = values.to(buffer.device)
        elif (held := module._parameters.get(leaf)) is None:
            continue
        elif isinstance(values, Packed):
            module._parameters[leaf] = nn.Parameter(values.to(held.device), requires_grad=False)
        else:
            held.data = values.to(held.device)
            if held.grad is not None:
                held.grad.data = held.grad.data.to(values.dtype)
