"""A masked LM's logits where something is to be filled in, and over those tokens that the texts use.

Of a row of 128 tokens 19 are hidden, and a model of a hundred languages tells 250,000 tokens apart: the head over all
positions and tokens would cost several times what the encoder does. So the encoder's output is cut down to the hidden
positions before the head reads it, and the last product runs over a table of tokens.

The head stays the model's own: a hook on the encoder hands on fewer rows, and the output embedding is called with the
rows of its weight and bias that the table names. What an adapter undoes before it (invertible adapters) is undone.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from addenda.core.modules.wrappers import unwrap
from addenda.train import chunked


def body_of(model: nn.Module) -> nn.Module | None:
    """Return the encoder under a model's head, None where they are not apart."""
    bare = unwrap(model)
    body = getattr(bare, "base_model", None)
    return body if isinstance(body, nn.Module) and body is not bare else None


def logits_at(model: nn.Module, inputs: dict[str, Tensor], seen: Tensor, table: Tensor | None = None) -> Tensor:
    """Return the logits (N, tokens) at the N true positions of `seen` (B × T), row by row.

    table: (tokens) ids that the logits are of; None: all. Raises AddendaError where the model returns none.
    """
    decoder = chunked.head_of(model)
    apart = table is not None and _is_plain(decoder)
    with _only_at(body_of(model), seen) as cut, chunked.without(decoder) if apart else nullcontext([]) as given:
        made = _logits(model(**inputs))
    if apart and not (len(given) == 1 and made is given[0]):  # it changes what its head returns
        apart = False
        with _only_at(body_of(model), seen) as cut:
            made = _logits(model(**inputs))
    rows = made[0] if cut and made.shape[:2] == (1, int(seen.sum())) else made[seen]
    if table is None:
        return rows
    if not apart:
        return rows.index_select(-1, table)
    return over(decoder, rows, table)


def over(decoder: Any, rows: Tensor, table: Tensor) -> Tensor:
    """Return the logits (N, tokens) of the head's inputs (N × d) over the tokens of a table."""
    part = {name: p.index_select(0, table) for name, p in (("weight", decoder.weight), ("bias", decoder.bias))
            if p is not None}  # fmt: skip
    return functional_call(decoder, part, (rows,))


def _is_plain(decoder: Any) -> bool:
    """Return whether a head is a product with a weight in memory that no adapter changes."""
    slots = slots_of(decoder) if isinstance(decoder, nn.Linear) else None
    changed = slots is not None and (
        getattr(decoder, "_addenda_properties", ()) or {"weight", "bias"} & set(slots.kinds)
    )
    return isinstance(decoder, nn.Linear) and not changed and type(decoder.weight.data) is Tensor


@contextmanager
def _only_at(body: nn.Module | None, seen: Tensor) -> Iterator[list[bool]]:
    """Let an encoder hand on the N true positions of `seen` alone (1 × N × d), in a `with` block; yields whether."""
    cut: list[bool] = []

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        states = output[0]
        if not isinstance(states, Tensor) or states.shape[:2] != seen.shape:
            return output
        rows = states[seen][None]
        cut.append(True)
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output.last_hidden_state = rows
        return output

    handle = None if body is None else body.register_forward_hook(hook)
    try:
        yield cut
    finally:
        if handle is not None:
            handle.remove()


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise AddendaError(f"The model returned {type(output).__name__} without logits. Give a masked LM.")
    return logits


@torch.no_grad()
def states_at(model: nn.Module, inputs: dict[str, Tensor], seen: Tensor) -> Tensor:
    """Return what the encoder hands to the head (N × d) at the N true positions of `seen` (B × T), no gradient."""
    body = body_of(model)
    if body is None:
        raise AddendaError(f"{type(model).__name__} has no encoder apart from its head (base_model).")
    return body(**inputs)[0][seen]


@contextmanager
def given_states(model: nn.Module, states: Tensor) -> Iterator[None]:
    """Let a model's encoder return these states (N × d), as one row, whatever it is given, in a `with` block."""
    from transformers.modeling_outputs import BaseModelOutput

    body: Any = body_of(model)
    body.forward = lambda *args, **kwargs: BaseModelOutput(last_hidden_state=states[None])  # type: ignore[arg-type]
    try:
        yield
    finally:
        del body.forward
