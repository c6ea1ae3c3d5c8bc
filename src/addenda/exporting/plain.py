"""Adapters that are trained in one form and used in another: the plain one that they come to, beside them."""

import time
from collections.abc import Mapping

import torch
from torch import nn

from addenda.core.adapter.attach import install, ready
from addenda.core.adapter.build import build_tensors
from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, Params, Replace
from addenda.core.site.site import owners_of, site_at
from addenda.core.state.state import record_of


@torch.no_grad()
def beside(adapter: Adapter, forms: Mapping[str, tuple[Method, Params]], name: str, was: str) -> Adapter:
    """Attach a new adapter at the same sites, idle and not training: of each path, a method and its tensors.

    Heads that were trained with the adapter come along. was: what the sites of the forms are, for errors. Raises
    AddendaError when other methods have sites in the adapter, when the name is taken, and when a change is merged.
    """
    started, (root, state, record) = time.perf_counter(), record_of(adapter.model, adapter.name)
    if other := set(record.methods) - set(forms) - set(record.also_train):
        where = f"{len(other)} sites, e.g. {min(other)}"
        raise AddendaError(f"{adapter.name!r} is no {was} at {where}; nothing was exported.")
    ready(root, name)
    heads = {path: (Replace(), t.stored()) for path, t in adapter.sites() if path in record.also_train}
    made, owners = {**forms, **heads}, owners_of(root)
    plan = [(site_at(root, path, owners), made[path][0]) for path in record.methods]
    own: dict[str, Params] = {
        path: {k: nn.Parameter(t.detach().clone()) for k, t in p.items()} for path, (_, p) in made.items()
    }
    built = build_tensors(plan, record.seed, stored=own)
    install(root, state, name, plan, built, record.also_train, record.seed, False, started, activate=False)
    return Adapter(root, name).requires_grad_(False)
