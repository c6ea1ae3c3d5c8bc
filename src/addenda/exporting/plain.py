"""Adapters that are trained in one form and used in another: the plain one that they come to, beside them."""

from collections.abc import Mapping

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, Params
from addenda.core.state.state import record_of
from addenda.exporting.install import install


def beside(adapter: Adapter, forms: Mapping[str, tuple[Method, Params]], name: str, was: str) -> Adapter:
    """Attach a new adapter at the same sites, idle and not training: of each path, a method and its tensors.

    Heads that were trained with the adapter come along. was: what the sites of the forms are, for errors. Raises
    AddendaError when other methods have sites in the adapter, when the name is taken, and when a change is merged.
    """
    root, _, record = record_of(adapter.model, adapter.name)
    if other := set(record.methods) - set(forms) - set(record.also_train):
        where = f"{len(other)} sites, e.g. {min(other)}"
        raise AddendaError(f"{adapter.name!r} is no {was} at {where}; nothing was exported.")
    heads = {path: t.stored() for path, t in adapter.sites() if path in record.also_train}
    return install(root, forms, name=name, heads=heads, labels=record.labels, seed=record.seed, what=f"This {was}")
