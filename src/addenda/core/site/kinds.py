"""Kinds of layer: how a stored weight is seen as a matrix, and how a product with any weight is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """One kind of layer. `product(module, x, weight, bias)` is its forward with another weight, as stored."""

    name: str
    product: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor] | None = None
    low_rank: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] | None = None  # (module, x, B, A) -> Δy
    transposed: bool = False
    dense: bool = False  # y = x Wᵀ + bias on the last dimension: takes a method's `apply` and the fused products

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return the stored weight as (m, n), or (experts, m, n) for stacked ones: a view wherever there is one."""
        if self.transposed:
            return weight.t()
        return weight.flatten(1) if self.name == "conv" else weight

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return a matrix in the shape of the stored weight `like`: the inverse of `to_matrix`."""
        return matrix.t() if self.transposed else matrix.reshape(like.shape)


def _linear(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_low_rank(module: Any, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return F.linear(F.linear(x, A), B)


def _conv1d(module: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def _conv(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return module._conv_forward(x, weight, bias)


def _conv_low_rank(module: Any, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """Apply B A as two convolutions. The r filters of A serve every group; B's rows belong to their own group."""
    groups, kernel = module.groups, module.weight.shape[1:]
    h = module._conv_forward(x, A.view(-1, *kernel).repeat(groups, *[1] * len(kernel)), None)
    pointwise = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 2]
    return pointwise(h, B.view(*B.shape, *[1] * (len(kernel) - 1)), groups=groups)


def _embedding(module: Any, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(ids, weight, module.padding_idx, None, 2.0, module.scale_grad_by_freq)


def _embedding_low_rank(module: Any, ids: Tensor, B: Tensor, A: Tensor) -> Tensor:
    y = F.embedding(ids, B) @ A
    if module.padding_idx is None:
        return y
    return torch.where((ids == module.padding_idx)[..., None], y.detach(), y)  # its row learns nothing, from A either


LINEAR = Kind("linear", _linear, _linear_low_rank, dense=True)


CONV1D = Kind("conv1d", _conv1d, _linear_low_rank, transposed=True, dense=True)  # transformers' GPT-2 layer


CONV = Kind("conv", _conv, _conv_low_rank)


EMBEDDING = Kind("embedding", _embedding, _embedding_low_rank)


PARAMETER = Kind("parameter")  # a raw parameter, read by its owner as an attribute


OUTPUT = Kind("output")  # no weight: what a module returns, see `Point`


KINDS = {kind.name: kind for kind in (LINEAR, CONV1D, CONV, EMBEDDING, PARAMETER, OUTPUT)}


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module that is called with its weight, or None."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return CONV
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__):
        return CONV1D
    return None
