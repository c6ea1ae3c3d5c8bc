"""Backward belongs into the block that arranged the forward, where gradient checkpointing is on.

What a checkpoint dropped is computed again during backward, with what acts then. After `composed` or `per_example`
that is something else, and the gradients would be wrong without a word. So the outputs of a forward inside such a block
look, when the first gradient reaches them, whether what acted in it still does.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from addenda.core.errors import AddendaError


def watch(root: nn.Module, acts: Callable[[], bool]) -> RemovableHandle | None:
    """Refuse a backward through a forward that runs from now on, at a time when acts() is false.

    None where no module of the model is checkpointed (transformers' flag, which says so of each).
    """
    checkpointed = [m for m in root.modules() if getattr(m, "gradient_checkpointing", False) is True]
    if not checkpointed:
        return None

    def look(grad: Tensor) -> None:
        if not acts():
            raise AddendaError(
                f"A forward of this {type(root).__name__} ran inside a `with` block of composed or per_example, and "
                "its backward runs outside: gradient checkpointing would compute the layers again with what acts now. "
                "Call backward inside the block, or switch checkpointing off before the forward."
            )

    def mark(module: nn.Module, args: tuple, out: Any) -> None:
        if acts() and any(m.training and m.gradient_checkpointing for m in checkpointed):
            for t in _tensors(out):
                if t.requires_grad:
                    t.register_hook(look)

    return root.register_forward_hook(mark)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
