"""What trains, or was drawn at random, in the base beside its adapters, and would be in no file."""

from collections.abc import Iterable

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.ours import is_ours
from addenda.core.site.targets import grouped
from addenda.core.state.state import State, intact

_FRESH = "_addenda_fresh"  # on a model: names of parameters that its folder had no weights for


def drawn_at_random(model: nn.Module, names: Iterable[str]) -> None:
    """Note on a model which of its parameters had no weights where it was loaded from; none: they have been fitted."""
    model.__dict__.pop(_FRESH, None)
    if found := tuple(names):
        model.__dict__[_FRESH] = found


def drawn_in(model: nn.Module) -> tuple[str, ...]:
    """Return which parameters of a model had no weights where it was loaded from, and have not been fitted since."""
    return tuple(model.__dict__.get(_FRESH, ()))


def refuse_outside(root: nn.Module, state: State, name: str, what: str) -> None:
    """Raise AddendaError where a parameter of the base trains beside all adapters, or was drawn and is in none of them.

    what: what is not done, for the error: "was not saved to a.safetensors".
    """
    intact(root, name, state.records[name])  # a module that was replaced trains, and is told as such
    parameters = {n: p for n, p in root.named_parameters() if not is_ours(n)}
    training = [n for n, p in parameters.items() if p.requires_grad]
    if training:
        top = list(dict.fromkeys(n.rpartition(".")[0] or n for n in training))
        raise AddendaError(
            f"{name!r} {what}: {len(training)} tensors of the base train beside it, and no adapter's file would hold "
            f"them: {_listed(training)}. Let the adapter own them, attach(…, also_train={top[:3]!r}); or stop them "
            "with requires_grad_(False) (attach does, but for freeze=False); or save(path, without_base=True) writes "
            "the adapter alone."
        )
    own = {path for record in state.records.values() for path in (*record.also_train, *record.methods)}
    drawn = [n for n in drawn_in(root) if n in parameters and n not in own]
    if drawn:
        raise AddendaError(
            f"{name!r} {what}: {len(drawn)} tensors were drawn at random as the model was loaded, are not trained, and "
            f"no adapter's file would hold them: {_listed(drawn)}. Train them with an adapter, "
            f"also_train={list(dict.fromkeys(n.rpartition('.')[0] for n in drawn))[:3]!r}; or save(path, "
            "without_base=True) writes the adapter alone."
        )


def _listed(names: list[str]) -> str:
    groups = [f"{pattern} ({len(paths)})" if len(paths) > 1 else pattern for pattern, paths in grouped(names).items()]
    return ", ".join(groups[:8]) + (f" … and {len(groups) - 8} more" if len(groups) > 8 else "")
