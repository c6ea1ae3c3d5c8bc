"""Switching which adapters of a model act, for everybody, and saying which there are."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import in_its_mode
from addenda.core.modules.wrappers import unwrap
from addenda.core.state.state import apply_active, find_state, intact, record_of, state_of


@checked()
@in_its_mode
def switch(model: nn.Module, name: str | Iterable[str] | None) -> None:
    """Make one adapter, several, or none of them act. Base bits are never touched.

    Of several, changes of weights add up, and changes of activations act one after another, in this order. This is the
    model's state: all threads see it, but for those in a block of `per_example`, `composed` or `disabled`. In a block
    of the caller's own it acts at once, and stays behind its end.

    Raises AddendaError for an unknown name, a merged change, and while another thread runs a forward of the model.
    """
    root, state = state_of(model)
    names: tuple[Any, ...] = () if name is None else (name,)
    if isinstance(name, Iterable) and not isinstance(name, str):
        names = tuple(name)
    for n in names:
        intact(root, n, record_of(root, n).record)
    if len(set(names)) < len(names):
        raise AddendaError(f"An adapter acts once; got {names}.")
    if state.merged is not None:
        raise AddendaError(f"{', '.join(state.active)} is merged into the base. Call unmerge(model) first.")
    apply_active(root, state, names)


@checked()
def status(model: nn.Module) -> str:
    """Describe which adapters are attached to the model and which of them act, one line each."""
    host = find_state(model)
    if host is None:
        return f"{type(unwrap(model)).__name__}: no adapter attached"
    root, state = host
    lines = [
        f"{type(root).__name__}: {len(state.records)} adapter(s), base {'merged' if state.merged else 'untouched'}"
    ]
    for name, record in state.records.items():
        adapter = Adapter(root, name)
        try:
            intact(root, name, record)
        except AddendaError as error:
            lines.append(f"  {name}: damaged: {error}")
            continue
        mark = "active" if name in state.active else "idle"
        trains = any(p.requires_grad for p in adapter.parameters())
        lines.append(
            f"  {name}: {mark}, {adapter.kinds}, {len(record.methods)} sites, "
            f"{adapter.trainable:,} trainable parameters{'' if trains else ' (not training)'}, step {record.step}"
            + (f", {len(record.left_out)} sites of its file left out" if record.left_out else "")
            + (f", {v}" if (v := adapter.vocabulary) else "")
        )
    return "\n".join(lines)
