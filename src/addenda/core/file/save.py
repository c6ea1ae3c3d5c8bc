"""Saving an adapter: one safetensors file with tensors, schema and the base's fingerprint.

The header's `addenda` entry is JSON: schema number, seed, step, the methods with all their options (older files: those
that differ from the defaults; what such a default was then stands in `Method.formerly`), and every
site with path, kind, stored shape and dtype, the SHA-256 of the base's unmodified bytes, sixteen of its values, and
the names and kinds of its tensors. Tensors are stored as "path/name", those that all sites of a method train together
as ".0/name" (of the next such method ".1/name"); the adapter's own name is in no key. Nothing that can be computed
again is stored, only a checksum of it. No pickle, no code and no import path is ever read. "labels", where they are
known, are the names of a classifier's outputs, in their order.

A matrix in few bits is two tensors, "path/name" its codes and "path/name.moments" its mean and standard deviation; its
shape stands under "packed" at the site, its bits among the options of the method ("head", for heads). Of a vocabulary
that has grown the new rows are there too: see `core.file.vocabulary`.

"ignorable" at a method names the options whose value is what a file without them means: a version that does not know
one of these leaves it out, and refuses the file for any other that it does not know.

"trained_on" names the tokenizer, and the adapters that acted beside, by hash: see `core.file.trained_on`.

"origin" at a site is its path in the model of training, where it was loaded under another (`load(rename=…)`): random
tensors are drawn by that path, for ever.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import give_back, wait, whole, writes
from addenda.core.disk.access import file_of
from addenda.core.file.fingerprint import checksum, fingerprint, sample
from addenda.core.file.header import HEAD, SCHEMA, Checksum, Header, SiteEntry, packed_as, write
from addenda.core.file.methods import described
from addenda.core.file.vocabulary import stored
from addenda.core.forward.tensors import Pool, SiteTensors
from addenda.core.method.contract import Params, Replace
from addenda.core.modules.borrow import in_its_mode
from addenda.core.packed.few_bits import FewBits, encoded
from addenda.core.packed.tensor import Packed
from addenda.core.site.site import Site, owners_of, site_at
from addenda.core.state.copies import unconverted
from addenda.core.state.outside import refuse_outside
from addenda.core.state.state import State, record_of

P = ParamSpec("P")
R = TypeVar("R")


class Held(Protocol):
    """An adapter on a model, as `core.adapter.handle.Adapter` is one."""

    model: nn.Module
    name: str

    @property
    def sharded(self) -> bool: ...
    def sites(self) -> Iterator[tuple[str, SiteTensors]]: ...
    def pools(self) -> Iterator[tuple[str, Pool]]: ...


def _as_trained(write: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of an adapter to find its values as they were before a merge converted the model."""

    @functools.wraps(write)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        adapter: Any = args[0] if args else kwargs.get("adapter")
        if isinstance(adapter, nn.Module) or not all(hasattr(adapter, n) for n in ("model", "name", "sites")):
            raise AddendaError(
                "What is saved is an adapter, as attach and load return it, or adapters(model)['its name']; got a "
                f"{type(adapter).__name__}."
            )
        root, state, _ = record_of(adapter.model, adapter.name)
        with unconverted(root, state.cast) if state.cast else nullcontext():
            return write(*args, **kwargs)

    return call


@in_its_mode
@_as_trained
def save(
    adapter: Held,
    path: str | Path,
    *,
    basis: bool = False,
    latent: bool = False,
    partial: bool = False,
    without_base: bool = False,
    heads: bool = True,
) -> Path:
    """Write the adapter to one file, atomically: a reader sees the old file or the new one, never a part.

    basis: store the tensors derived from W as well (singular vectors), for machines whose factorisations differ.
    latent: of matrices in few bits store what training moves, in float32, so that it can go on; else their codes.
    partial: write an adapter of which a load has left sites out; the file holds those that are here.
    without_base: write the adapter although tensors of the base train beside it, which the file does not hold.
    heads: False leaves the trained copies of modules (also_train) out, which then are the base's own at load.
    Of a sharded model (FSDP2) every process must call it: tensors are gathered, the first process writes, and all
    return when the file is there.
    Raises AddendaError for tensors that are empty or not finite, and for those of the base that train, or were drawn
    at random, and are in no adapter; then nothing is written.
    """
    path = file_of(path)
    give_back(adapter.model)
    root, state, record = record_of(adapter.model, adapter.name)
    if not without_base:
        refuse_outside(root, state, adapter.name, f"was not saved to {path}")
    if record.left_out and not partial:
        raise AddendaError(
            f"{adapter.name!r} is a part of its file ({len(record.left_out)} sites were left out as it was loaded, "
            f"e.g. {next(iter(record.left_out))}), and what is written would be one too. Where you want that: "
            "partial=True."
        )
    methods = list(dict.fromkeys(m for p, m in record.methods.items() if p not in record.also_train))
    tensors: dict[str, Tensor] = {}
    sites: list[SiteEntry] = []
    problems, owners, copy = [], owners_of(root), Replace()
    gathered = adapter.sharded
    for site_path, site_tensors in adapter.sites():
        site = replace(site_at(root, site_path, owners), origin=record.origins.get(site_path, ""))
        head = site_path in record.also_train
        if head and not heads:
            continue
        if absent := [k for k, t in (site_tensors.stored() | {"the base": site.weight}).items() if t.is_meta]:
            raise AddendaError(
                f"{adapter.name!r} was not saved to {path}: at {site_path} {', '.join(absent)} is on the meta device, "
                "without values (offloaded?). Bring the whole model into memory first."
            )
        copy = site_tensors.method if head else copy
        method = HEAD if head else methods.index(site_tensors.method)
        entry, of_site, wrong = _site(state, site, site_tensors, method, basis, latent)
        sites.append(entry)
        tensors |= of_site
        problems += wrong
    pools = dict(adapter.pools())
    for pool_name, pool in pools.items():
        for key, tensor in pool.stored().items():
            tensor = whole(tensor)
            problems += _unsaved(f"{pool_name}/{key}", tensor)
            tensors[f"{pool_name}/{key}"] = tensor.cpu().contiguous()
    vocabulary, rows = stored(root, state) if record.grown else (None, {})
    for key, tensor in rows.items():
        problems += _unsaved(key, tensor)
    tensors |= rows
    if problems:
        raise AddendaError(
            f"{adapter.name!r} was not saved to {path}: {'; '.join(problems[:8])}"
            f"{f' … and {len(problems) - 8} more' if len(problems) > 8 else ''}."
        )
    header = Header(
        schema=SCHEMA,
        seed=record.seed,
        step=record.step,
        methods=described(methods),
        basis=basis,
        sites=tuple(sites),
        pools=tuple(tuple(pool._parameters) for pool in pools.values()),
        head=copy.options(defaults=True) if record.also_train and heads else {},
        labels=record.labels,
        vocabulary=vocabulary,
        trained_on=record.trained_on,
        note={**record.note, **({"left_out": dict(record.left_out)} if record.left_out else {})},
    )
    if writes(gathered):
        write(path, header, tensors)
    wait(gathered)
    return path


def _site(
    state: State, site: Site, held: SiteTensors, method: int, basis: bool, latent: bool
) -> tuple[SiteEntry, dict[str, Tensor], list[str]]:
    """Return a site's entry in the header, its tensors by their names in the file, and why any of them cannot be there.

    method: its place among those of the file, or HEAD.
    """
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    derived = derived_of(held)
    shapes: dict[str, tuple[int, ...]] = {}  # of what becomes codes
    for key, tensor in (held.stored() | (derived if basis else {})).items():
        name, tensor = f"{site.path}/{key}", whole(tensor)
        problems += _unsaved(name, tensor)
        packed = None if key in derived else _packed(held, key, tensor, latent)
        if packed is not None:
            shapes[key] = tuple(packed.shape)
            tensors |= packed_as(name, packed)
            continue
        plain = tensor.detach().cpu().contiguous()
        tensors[name] = plain.clone() if key in derived else plain  # shared ones once for every site
    base, seen = state.base(site), None if method == HEAD else tuple(sample(state, site))
    checks = {k: checksum(k, t) for k, t in derived.items()}
    entry = SiteEntry(
        path=site.path,
        kind=site.kind.name,
        shape=tuple(site.stored),
        dtype=str(base.dtype).removeprefix("torch."),
        method=method,
        trainable=tuple(held._parameters),
        frozen=tuple(held.frozen),
        form=base.form if isinstance(base, Packed) else None,
        hash=None if method == HEAD else fingerprint(state, site),
        sample=seen,
        checks=checks,
        packed=shapes,
        origin=site.origin or None,
    )
    return entry, tensors, problems + _unknowable(site.path, seen or (), checks)


def _packed(site_tensors: SiteTensors, key: str, tensor: Tensor, latent: bool) -> FewBits | None:
    """Return the codes of a matrix, as held or encoded now; None for a tensor that is stored as it is."""
    if isinstance(tensor, FewBits):
        return tensor
    bits = site_tensors.method.bits
    if (
        bits is None
        or latent
        or key in site_tensors.frozen
        or key not in site_tensors.matrices
        or _unsaved(key, tensor)
    ):
        return None
    return encoded(tensor, bits, site_tensors.stacked)


def _unsaved(key: str, tensor: Tensor) -> list[str]:
    """Return why a tensor cannot be saved, in a list; empty where it can."""
    if tensor.numel() == 0:
        return [f"{key} is empty (shape {tuple(tensor.shape)})"]
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return [f"{key} holds values that are not finite"]
    return []


def _unknowable(path: str, seen: tuple[float, ...], checks: dict[str, Checksum]) -> list[str]:
    """Return why a load could not know the base at a site again, in a list; empty where it can."""
    if not all(map(math.isfinite, seen)):
        return [f"the base at {path} holds values that are not finite, by which no load could know it again"]
    sums = [k for k, c in checks.items() if not isinstance(c, str) and not all(map(math.isfinite, c))]
    return [f"{path}/{k}, computed from the base, holds values that are not finite" for k in sums]


def derived_of(held: SiteTensors) -> Params:
    """Return the tensors of a site that were computed from the base, of which a file has checksums."""
    derived = held._non_persistent_buffers_set  # in no order of its own
    named = {k: t for k, t in held._buffers.items() if k in derived and not k.endswith(" in training")}
    return {k: t for k, t in named.items() if t is not None}
