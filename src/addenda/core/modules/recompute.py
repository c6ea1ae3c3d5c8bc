"""Tensors that are cheap to compute, kept for backward as their recipe and computed again there.

`cheap(make, *inputs)` is `make(*inputs)` with the same bits in forward and backward. The result carries its recipe; a
layer that runs inside `as_recipe(x)` and would keep x keeps the recipe. Whoever asks first makes x again, with the
graph that leads back to the inputs; the others share it, and `cheap`'s own backward uses it up.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import _autograd
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from addenda.core.base.errors import AddendaError
from addenda.core.modules.autocast import autocast_dtype, without_autocast
from addenda.core.modules.returned import returned

Make = Callable[..., Tensor]

_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8


@dataclass
class _Again:
    """The detached inputs and their output, shared by all who ask for a recipe's value in one backward."""

    graph: tuple[list[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class _Recipe:
    make: Make  # as it ran: pure, without random numbers, without tensors of its own that want a gradient
    inputs: tuple[Tensor, ...]
    again: _Again
    versions: tuple[int, ...]  # of the inputs and of what was made of them

    def value(self) -> Tensor:
        if self.versions[:-1] != tuple(t._version for t in self.inputs):
            raise AddendaError(
                "A lean module keeps its inputs for backward, and one of them has been changed in place since the "
                "forward. Change a copy of it, or call unlean(model) before the forward."
            )
        if self.again.graph is None:
            self.again.graph = _run(self.make, self.inputs, [t.requires_grad for t in self.inputs])
        return self.again.graph[1].detach()


def cheap(make: Make, *inputs: Tensor) -> Tensor:
    """Return make(*inputs), a pure and deterministic function, of which autograd keeps only the inputs."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs) or _others_decide():
        return make(*inputs)
    kind = inputs[0].device.type
    dtype = autocast_dtype(kind)

    def same(*inputs: Tensor) -> Tensor:
        with without_autocast(kind) if dtype is None else torch.autocast(kind, dtype):
            return make(*inputs)

    rerun = _Again()
    result = _Cheap.apply(same, rerun, *inputs)
    result._addenda_recipe = _Recipe(same, inputs, rerun, tuple(t._version for t in (*inputs, result)))
    return result


def as_recipe(x: Tensor) -> AbstractContextManager:
    """Make autograd keep x, inside a `with` block, as its recipe where it has one."""
    recipe = None if torch.compiler.is_compiling() else getattr(x, "_addenda_recipe", None)
    if recipe is None or _hooks is None or _others_decide() or x._version != recipe.versions[-1]:
        return nullcontext()
    storage = id(x.untyped_storage())

    def pack(t: Tensor):
        if id(t.untyped_storage()) != storage:
            return t
        return recipe, (t.shape, t.stride(), t.storage_offset())

    def unpack(kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].value().as_strided(*kept[1])

    return saved_tensors_hooks(pack, unpack)


def _others_decide() -> bool:
    """Return whether torch.compile or saved-tensor hooks (gradient checkpointing) decide what is kept for backward."""
    return torch.compiler.is_compiling() or (_hooks is not None and _hooks(False) is not None)


def _run(make: Make, inputs: tuple[Tensor, ...], needs: list[bool]) -> tuple[list[Tensor], Tensor]:
    leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, needs, strict=True)]
    with torch.enable_grad():
        return leaves, make(*leaves)


class _Cheap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make: Make, again: _Again, *inputs):
        ctx.make, ctx.again = make, again
        ctx.save_for_backward(*inputs)
        return returned(make(*inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        inputs, need = ctx.saved_tensors, ctx.needs_input_grad[2:]
        leaves, output = ctx.again.graph or _run(ctx.make, inputs, need)
        ctx.again.graph = None
        grads = iter(torch.autograd.grad(output, [t for t, n in zip(leaves, need, strict=True) if n], gy))
        return None, None, *[next(grads) if n else None for n in need]
