"""Every change of an adapter as a product of two thin matrices, which is what other programs read."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.build import build_tensors
from addenda.core.adapter.calibration import stand_in
from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import WeightMethod
from addenda.core.modules.borrow import training_mode
from addenda.core.site.site import Site, site_at
from addenda.exporting.deltas import changed_sites, delta, thin_factors
from addenda.reducing.delta import low_rank as nearest_low_rank

_SIDE = 64  # of a layer on which a method is tried
EXACT = 1e-6  # ‖ΔW − B A‖ / ‖ΔW‖ up to which a product is said to be ΔW itself


@dataclass(frozen=True)
class Pair:
    """ΔW ≈ B A at one site, with every scale folded in; float32, on the CPU. Of a stack of matrices, stacks.

    error: ‖ΔW − B A‖ / ‖ΔW‖, 0 where ΔW is such a product.
    """

    site: Site
    B: Tensor  # m × r
    A: Tensor  # r × n
    error: float = 0.0

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def exact(self) -> bool:
        """Whether the product is ΔW up to rounding."""
        return self.error <= EXACT


@checked()
@torch.no_grad()
def low_rank(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    second: Mapping[str, Tensor] | None = None,
) -> dict[str, Pair]:
    """Return every site's ΔW as B A, by path: exactly where a method has it so, else the nearest of a rank.

    rank: the highest that is wanted; energy: instead, the share of ‖ΔW‖² to keep at each site, which gives its rank.
    second: by path the second moment E[x xᵀ] (n × n) of its inputs, by which errors are weighed. A site that is low
    rank already, and no higher than asked, stays as it is.

    Raises AddendaError for hidden methods, for changes of vectors, and where a change is not low rank and neither rank
    nor energy is given, with the ranks that would keep 90 and 99 % of it.
    """
    if rank is not None and energy is not None:
        raise AddendaError(f"Give rank= or energy=, not both (got rank={rank}, energy={energy}).")
    pairs, dense = {}, []
    with training_mode(adapter.model, False):
        for site, tensors in changed_sites(adapter):
            if len(site.weight.shape) < 2:
                raise AddendaError(
                    f"{site.path} is a vector, and a change of it is no product of two matrices. Export the adapter as "
                    "'merged', or train without it."
                )
            pair = _pair(site, tensors, rank, energy, (second or {}).get(site.path))
            if pair is None:
                dense.append((site, tensors))
            else:
                pairs[site.path] = pair
        if dense:
            raise _not_low_rank(adapter, dense)
    if not pairs:
        raise AddendaError(f"{adapter.name!r} changes no weight but the heads that it trains as whole copies.")
    return pairs


def _pair(
    site: Site, tensors: SiteTensors, rank: int | None, energy: float | None, second: Tensor | None
) -> Pair | None:
    """Return a site's pair; None where ΔW is not low rank and nobody said how far it may be made so."""
    thin = thin_factors(site, tensors)
    if thin is not None and energy is None and (rank is None or thin[1].shape[-2] <= rank):
        return Pair(site, thin[0].float().cpu(), thin[1].float().cpu())
    if rank is None and energy is None:
        return None
    change = delta(site, tensors).cpu() if thin is None else (thin[0].cpu(), thin[1].cpu())
    highest = None if rank is None else min(rank, *site.shape)
    near = nearest_low_rank(change, rank=highest, energy=energy, second=second)
    return Pair(site, near.B.float(), near.A.float(), near.error)


def balanced(pair: Pair) -> Pair:
    """Return the same product with factors whose largest entries are alike, so that neither underflows in half.

    One is taken times, the other over a power of two, which rounds nothing.
    """
    largest = [float(t.abs().max()) if t.numel() else 0.0 for t in (pair.B, pair.A)]
    if not all(0 < x < math.inf for x in largest):
        return pair
    by = 2.0 ** round(math.log2(largest[1] / largest[0]) / 2)
    return dataclasses.replace(pair, B=pair.B * by, A=pair.A / by)


@cache
def is_low_rank(method: Any) -> bool:
    """Return whether a method's ΔW is a product of thin matrices by its form: found out on a small layer."""
    if not isinstance(method, WeightMethod):
        return False
    if (getattr(method, "rank", None) or 0) >= _SIDE // 2:
        method = dataclasses.replace(method, rank=_SIDE // 8)  # the form counts, and no small layer has such a rank
    linear: Any = nn.utils.skip_init(nn.Linear, _SIDE, _SIDE)  # which would draw of torch's own numbers
    linear.weight.data = Stream(0, "is_low_rank").normal(_SIDE, _SIDE, std=_SIDE**-0.5)
    linear.bias.data.zero_()
    site = site_at(nn.ModuleDict({"layer": linear}), "layer")
    try:
        sample = stand_in(method, site.matrix.float())
        tensors = build_tensors([(site, method)], 0, seen=None if sample is None else {"layer": sample})["layer"]
        return thin_factors(site, tensors) is not None
    except AddendaError:  # options that no small layer can have, or neighbours that are not there
        return False


def _not_low_rank(adapter: Adapter, dense: list[tuple[Site, SiteTensors]]) -> AddendaError:
    site, tensors = dense[0]
    squares = torch.linalg.svdvals(delta(site, tensors).cpu()).square().reshape(-1, min(site.shape))[0]
    kept = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
    ranks = [min(int((kept < share).sum()) + 1, min(site.shape)) for share in (0.9, 0.99)]
    names = ", ".join(dict.fromkeys(t.method.name for _, t in dense))
    return AddendaError(
        f"{adapter.name!r} ({names}) is no low-rank change at {len(dense)} sites, e.g. {site.path}: as B A it is an "
        f"approximation, and how near it comes is for you to say: rank= or energy=. There rank {ranks[0]} keeps 90 % "
        f"of ‖ΔW‖² and rank {ranks[1]} keeps 99 %, of {min(site.shape)}. Or export it as 'merged', which is exact."
    )
