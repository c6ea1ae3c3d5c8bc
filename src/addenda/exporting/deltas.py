"""What an adapter adds to each weight, as matrices: one site at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors, each_of
from addenda.core.method.contract import to_float
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.site import Site, owners_of, site_at
from addenda.core.state.state import record_of


def changed_sites(adapter: Adapter, hidden: bool = False) -> Iterator[tuple[Site, SiteTensors]]:
    """Yield the sites whose weight the adapter changes, heads that are trained as whole copies left out.

    hidden: yield the places too where it changes activations. Raises AddendaError without, before anything is yielded,
    where it does: no weight can hold that.
    """
    root, _, record = record_of(adapter.model, adapter.name)
    if not hidden:
        refuse_hidden(adapter)
    owners = owners_of(root)
    for path, tensors in adapter.sites():
        if path not in record.also_train:
            yield site_at(root, path, owners), tensors


def refuse_hidden(adapter: Adapter) -> None:
    """Raise AddendaError where an adapter changes what modules return, which no weight can hold."""
    hidden = {path: m.name for path, m in adapter.methods.items() if isinstance(m, HiddenMethod)}
    if hidden:
        raise AddendaError(
            f"{adapter.name!r} has {', '.join(dict.fromkeys(hidden.values()))} at {len(hidden)} places, e.g. "
            f"{next(iter(hidden))}: that changes activations, and no change of a weight is the same. Keep it attached, "
            "or train a method of weights (addenda methods)."
        )


@torch.no_grad()
def delta(site: Site, tensors: SiteTensors, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return ΔW at a site as its kind of layer sees the weight: m × n, a stack of these, or a vector.

    As it acts outside training; the tensors' own module says which mode they are in.
    """
    m, W = tensors.method, site.matrix.to(dtype)
    p = to_float(tensors.tensors(), dtype)
    if m.any_shape or W.dim() < 3:
        return m.delta(W, p)
    return torch.stack([m.delta(w, q) for w, q in zip(W, each_of(p, tensors.shared, len(W)), strict=True)])


@torch.no_grad()
def factors(site: Site, tensors: SiteTensors, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return (B: m × r, A: r × n) with ΔW = B A of a method that has factors, scales folded in; of a stack, stacks."""
    m, p, shape = tensors.method, to_float(tensors.tensors(), dtype), (site.shape[0], site.shape[1])
    if site.matrix.dim() < 3:
        B, A = m.factors(p, shape).pair()
        return B.to(dtype), A.to(dtype)
    pairs = [m.factors(q, shape).pair() for q in each_of(p, tensors.shared, site.copies)]
    return torch.stack([b for b, _ in pairs]).to(dtype), torch.stack([a for _, a in pairs]).to(dtype)


@torch.no_grad()
def thin_factors(site: Site, tensors: SiteTensors, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor] | None:
    """Return (B: m × r, A: r × n) with ΔW = B A, every scale folded in, where a method has ΔW so; else None.

    Of a stack of matrices, stacks. Factors that are as wide as the matrix itself are none, but those of a LoRA.
    """
    m, narrower = tensors.method, min(site.shape)
    if not m.has("factors") or m.has("magnitude"):
        return None
    B, A = factors(site, tensors, dtype)
    return (B, A) if B.shape[-1] < narrower or (m.has("pair") and B.shape[-1] == narrower) else None
