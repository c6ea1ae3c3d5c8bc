"""How a run is computed: what "auto" chooses, measured once and kept in the record; and gradient checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.data.encoded import Encoded
from addenda.models.machine import device_of
from addenda.train import attention as attentions
from addenda.train import compiled
from addenda.train.loss import score


def attention_of(
    asked: str | None, known: dict | None, model: nn.Module, train: Encoded, batch: int, steps: int
) -> attentions.Attention:
    """Return the attention that was asked for, that a resumed run had, or that measuring chooses."""
    if asked != "auto":
        return attentions.Attention(asked or attentions.current(model))
    return attentions.Attention(**known) if known else attentions.choose(model, train, batch, steps)


def compilation(model: nn.Module, adapter: Adapter, train: Encoded, rows: list[int], whole: bool) -> dict:
    """Compile and measure on the given rows, which are the same in a resumed run: it gets the same code."""
    tensors = {k: t.to(device_of(model)) for k, t in train.batch(rows).items()}
    options: dict[str, Any] = {"whole": whole, "objective": train.objective}
    found = compiled.measure(lambda: score(model, tensors, train.kind, **options).mean)
    for p in adapter.parameters():
        p.grad = None
    return asdict(found) | {"paid": found.paid}


# what transformers leaves on the modules besides: it takes neither these nor its hook on the embedding away
_MARKS = ("gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks")


@contextmanager
def recomputing(model: Any, on: bool = True) -> Iterator[None]:
    """Turn on gradient checkpointing (non-reentrant) for the length of a `with` block.

    Raises AddendaError where the model has none.
    """
    if not on or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        yield
        return
    switch = (
        "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    )
    before = [(m, {k: vars(m)[k] for k in _MARKS if k in vars(m)}, set(m._forward_hooks)) for m in model.modules()]
    try:
        getattr(model, f"{switch}_enable")({"use_reentrant": False})
    except (AttributeError, ValueError):
        raise AddendaError(f"{type(model).__name__} has no gradient checkpointing; leave checkpointing out.") from None
    try:
        yield
    finally:
        getattr(model, f"{switch}_disable")()
        for module, own, hooks in before:
            for name in _MARKS:
                vars(module).pop(name, None)
            vars(module).update(own)
            for new in set(module._forward_hooks) - hooks:
                del module._forward_hooks[new]
