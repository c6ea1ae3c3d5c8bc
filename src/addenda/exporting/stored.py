"""An adapter file against a folder of weights: every check of a load, with one weight in memory at a time.

The model is a skeleton (`models.skeleton`). Where a method computes from a weight, the weight is put there for as long
as that takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from addenda.core.adapter.build import Assigned, kept_as, tensors_of
from addenda.core.adapter.fit import fitting_tensors
from addenda.core.adapter.load import check_factors, match, mismatch, other_base, stored_params, stored_pools
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.disk.access import shown
from addenda.core.file.header import Header, SiteEntry
from addenda.core.file.methods import methods_of
from addenda.core.forward.tensors import Pool, SiteTensors
from addenda.core.method.contract import Method, Params, Shape
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.site import Site
from addenda.models.skeleton import filled

Names = Mapping[str, tuple[str, ...]]  # of every parameter all names, see `models.skeleton.names_of`


@dataclass
class StoredAdapter:
    """An adapter file whose sites, methods and tensors fit a skeleton."""

    path: Path
    header: Header
    tensors: dict[str, Tensor]
    model: nn.Module
    plan: Assigned
    stored: dict[str, Params]
    pools: dict[Method, Pool]
    drawn: dict[Method, Params]  # what all sites of a method share, drawn once
    entries: dict[str, SiteEntry]  # by path

    @classmethod
    def of(cls, path: Path, header: Header, tensors: dict[str, Tensor], model: nn.Module) -> "StoredAdapter":
        """Match a file with a skeleton. Raises AddendaError as `load` does, and for methods that change activations."""
        methods, copy = methods_of(header, path)
        refuse_hidden(path, header, methods)
        plan = match(model, header, methods, copy, path)
        stored = {s.path: stored_params(s, header.bits(s), tensors) for s in header.sites}
        pools = {m: Pool(m, p) for m, p in stored_pools(plan, header, tensors, path).items()}
        fitting_tensors(plan, stored, path)
        drawn: dict[Method, Params] = {}
        for m in dict.fromkeys(m for _, m in plan):
            shapes: list[Shape] = [site.shape for site, method in plan if method == m]
            drawn[m] = m.shared(shapes, Stream(header.seed, "shared")) if m.has("shared") else {}
        return cls(path, header, tensors, model, plan, stored, pools, drawn, {s.path: s for s in header.sites})

    def mismatch(self, site: Site, W: Tensor, names: Names, base: str) -> str | None:
        """Return the site's name, for an error, where the weight W is not the one of training; else None.

        base="exact": W has the bytes of training, as it is or rounded to the dtype of training.
        """
        entry = self.entries[site.path]
        dtype = getattr(torch, entry.dtype, None)
        if base == "exact" and isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            W = W.to(dtype)
        with filled(self.model, {site.tensor_path: W}, names):
            return mismatch(None, entry, site, base)

    def other_base(self, base: str, sites: list[str], folder: Path) -> str:
        """Return what to say where weights of a folder are not those of training."""
        forms = {s.form for s in self.header.sites if s.form is not None}
        if forms:
            return (
                f"{self.path} was trained on a base in {', '.join(sorted(forms))}, and {shown(folder)} holds plain "
                "weights. Load both with load_model(…, quantize=…) and load, say with merge(model, base=…, full=…) "
                "onto which values the change is written, and save that model. Nothing was written."
            )
        return f"{other_base(self.path, base, sites, len(self.plan))} Nothing was written."

    @torch.no_grad()
    def at(self, site: Site, method: Method) -> SiteTensors:
        """Return the adapter's tensors at a site whose weight, and those beside it, are there for now.

        Raises AddendaError where tensors that are computed from the weight are not those of training.
        """
        shared = kept_as(self.drawn[method], site)
        pool = self.pools.get(method)
        built = tensors_of(site, method, self.header.seed, shared, None, self.stored[site.path], pool)
        entry = replace(self.header, sites=(self.entries[site.path],))
        check_factors(entry, {site.path: site.weight.numel()}, {site.path: built}, self.tensors, self.path)
        return built.eval()


def refuse_hidden(path: Path, header: Header, methods: list[Method]) -> None:
    """Raise AddendaError where a file has methods that change activations, which no weight can hold."""
    hidden = [s.path for s in header.sites if not s.is_head and isinstance(methods[s.method], HiddenMethod)]
    if hidden:
        names = dict.fromkeys(m.name for m in methods if isinstance(m, HiddenMethod))
        raise AddendaError(
            f"{path} cannot be merged: {', '.join(names)} changes what modules return ({len(hidden)} places, e.g. "
            f"{hidden[0]}), which no weight can hold. Keep it beside the base."
        )


def one_of(tensors: SiteTensors, e: int) -> SiteTensors:
    """Return the tensors of one matrix of a stack, as a stack of one."""
    own = {k: t if k in tensors.shared else t[e : e + 1] for k, t in tensors.stored().items()}
    own = {k: nn.Parameter(t, False) if k in tensors._parameters else t for k, t in own.items()}
    held = {k: t for k, t in tensors._buffers.items() if t is not None and k not in own}
    derived = {k: t[e : e + 1] for k, t in held.items() if k not in tensors.shared}
    shared = {k: t for k, t in held.items() if k in tensors.shared}
    pool = tensors._modules.get("pool")
    return SiteTensors(tensors.method, own, derived, shared, pool if isinstance(pool, Pool) else None, True).eval()
