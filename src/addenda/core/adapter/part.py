"""A part of a file: the sites that fit, without those that do not (`load(allow_partial=True)`).

A site stands for itself, so that some of them are an adapter too. What all sites of a method share is drawn, or was
trained, for all of them: a part is allowed where it would be the same for those that are left, and refused else.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from addenda.core.adapter.build import Blank, pool_template
from addenda.core.adapter.fit import form_of
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import Header, SiteEntry
from addenda.core.method.contract import Method, Params, Shape
from addenda.core.site.kinds import KINDS, OUTPUT


def without(
    header: Header, tensors: dict[str, Tensor], methods: list[Method], left_out: Collection[str], path: str | Path
) -> tuple[Header, dict[str, Tensor]]:
    """Return a file's header and tensors without some of its sites.

    Raises AddendaError where what all sites of a method share would be other for those that are left.
    """
    kept = tuple(s for s in header.sites if s.path not in left_out)
    _same_for_all(header.sites, kept, methods, path)
    gone = {f"{s.path}/" for s in header.sites if s.path in left_out}
    rest = {k: t for k, t in tensors.items() if k[: k.rfind("/") + 1] not in gone and not k.startswith(".")}
    before, after = (_pooled(sites, methods) for sites in (header.sites, kept))
    places = [before.index(m) for m in after if before.index(m) < len(header.pools)]
    for new, old in enumerate(places):
        rest |= {f".{new}/{name}": tensors[f".{old}/{name}"] for name in header.pools[old]}
    labels = header.labels if header.heads == tuple(s for s in kept if s.is_head) else ()
    return replace(header, sites=kept, pools=tuple(header.pools[i] for i in places), labels=labels), rest


def _pooled(sites: tuple[SiteEntry, ...], methods: list[Method]) -> list[Method]:
    """Return the methods whose sites train tensors together, in the order in which a file has those."""
    return [m for m in _by_method(sites, methods) if m.has("pool")]


def _same_for_all(
    sites: tuple[SiteEntry, ...], kept: tuple[SiteEntry, ...], methods: list[Method], path: str | Path
) -> None:
    before, after = _by_method(sites, methods), _by_method(kept, methods)
    for m, own in before.items():
        rest = after.get(m, [])
        if not rest or len(rest) == len(own) or not (m.has("shared") or m.has("pool")):
            continue
        if _shared_forms(m, own) != _shared_forms(m, rest):
            raise AddendaError(
                f"{path} cannot be loaded in part: its sites of {m.name} share tensors that are made for all of them, "
                f"and for the {len(rest)} of {len(own)} that fit they would be others. Nothing was loaded."
            )


def _by_method(sites: tuple[SiteEntry, ...], methods: list[Method]) -> dict[Method, list[SiteEntry]]:
    found: dict[Method, list[SiteEntry]] = {}
    for s in (s for s in sites if not s.is_head):
        found.setdefault(methods[s.method], []).append(s)
    return found


def _shared_forms(m: Method, sites: list[SiteEntry]) -> dict[str, tuple] | None:
    """Return names and forms of what sites share: equal forms are drawn equal, from one stream. No values are made."""
    try:
        shapes = [_shape(s) for s in sites]
        with torch.device("meta"), torch.no_grad():
            shared: Params = m.shared(shapes, Blank()) if m.has("shared") else {}
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError):  # of shapes that no model has
        return None
    pool = pool_template(m, shapes) if m.has("pool") else {}
    return {k: form_of(t, False) for k, t in shared.items()} | {f".{k}": form_of(t, True) for k, t in pool.items()}


def _shape(s: SiteEntry) -> Shape:
    """Return what `Site.shape` is at a place that this model does not have."""
    if s.kind == OUTPUT.name:
        return s.shape
    kind = KINDS.get(s.kind)
    shape = s.shape if kind is None else tuple(kind.to_matrix(torch.empty(s.shape, device="meta")).shape)
    return shape[-2:] if len(shape) > 1 else (shape[0] if shape else 1, 1)
