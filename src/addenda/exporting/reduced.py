"""One site's change in a smaller form: the method and the tensors of each, and what it costs in error."""

from typing import Any

import torch
from torch import Tensor

from addenda.core.base.largest import narrow
from addenda.core.forward.execute import effective
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.deltas import delta, thin_factors
from addenda.exporting.reduce_report import ReducedSite
from addenda.methods.dense_delta import DenseDelta
from addenda.methods.lora import LoRA
from addenda.methods.patch import Patch
from addenda.methods.shira import SHiRA
from addenda.reducing.delta import Known, difference, few_bits, low_rank, top_k


def form_of(
    site: Site, live: list[SiteTensors], to: str, given: dict[str, Any], second: Tensor | None
) -> tuple[tuple[Method, dict[str, Tensor]], ReducedSite] | None:
    """Return (method and tensors, the row of the report) of a site; None where ΔW is zero."""
    D = total_delta(site, live)
    size, (m, n) = float(D.norm()), site.shape
    if not size:
        return None
    method: Method
    tensors: dict[str, Tensor]
    if to == "lora":
        rank = given["rank"] and min(given["rank"], m, n)
        thin = low_rank(_known(site, live) or D, rank=rank, energy=given["energy"], second=second)
        method, tensors = LoRA(rank=thin.rank), {"A": thin.A, "B": thin.B}
        form, numbers, error, energy = f"rank {thin.rank}", thin.A.numel() + thin.B.numel(), thin.error, thin.energy
    elif to == "sparse":
        count = given["count"] and min(given["count"], m * n)
        sparse = top_k(D, count=count, density=given["density"], second=second)
        method = SHiRA(mask="given", count=sparse.count)
        tensors = {"index": narrow(sparse.index, m * n), "values": sparse.values}
        form, numbers, error, energy = f"{sparse.count:,} entries", sparse.values.numel(), sparse.error, sparse.energy
    elif to == "bits":
        bits = given["bits"] or 1
        coded = few_bits(D.float(), bits)
        method, tensors = DenseDelta(bits=bits), {"change": coded.codes}
        form, numbers = f"{bits} bit{'s' * (bits > 1)}", D.numel()
        error, energy = coded.error, 1 - coded.error**2
    else:
        W, target = (site.kind.to_matrix(t.detach()) for t in (site.weight, effective(site.kind, site.weight, live)))
        index, values = _differences(W, target)
        if not index.shape[-1]:
            return None
        method, tensors = Patch(count=index.shape[-1]), {"index": narrow(index, m * n), "values": values}
        error = float(((target.double() - W.double()) - D).norm()) / size
        form, numbers, energy = f"{index.shape[-1]:,} entries", values.numel(), 1 - error**2
    return (method, tensors), ReducedSite(site.path, form, numbers, error, energy, size, second is not None)


def total_delta(site: Site, live: list[SiteTensors]) -> Tensor:
    """Return ΣΔW in float64."""
    total = delta(site, live[0])
    for tensors in live[1:]:
        total = total + delta(site, tensors)
    return total


def _known(site: Site, live: list[SiteTensors]) -> Known | None:
    """Return ΣΔW as two thin factors, where every change is known as such."""
    found = [thin_factors(site, tensors) for tensors in live]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    return torch.cat([B for B, _ in pairs], -1), torch.cat([A for _, A in pairs], -2)


def _differences(W: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (positions: K, or k × K of a stack, and the target's values there), where the bits differ.

    Every matrix of a stack has as many; where it differs in fewer, the first of its equal entries fill up.
    """
    if W.dim() == 2:
        found = difference(W, target)
        return found.index, found.values
    each = [difference(w, t).index for w, t in zip(W, target, strict=True)]
    count, index = max(map(len, each)), []
    for positions in each:
        mark = torch.zeros(W[0].numel(), device=W.device).index_fill(0, positions, 1.0)
        index.append(torch.sort(mark, descending=True, stable=True).indices[:count].sort().values)
    stacked = torch.stack(index)
    return stacked, target.flatten(1).gather(1, stacked)


def is_matrix(site: Site, live: list[SiteTensors]) -> bool:
    """Return whether a site is changed as a matrix or a stack of them; else its whole copy comes along."""
    return site.matrix.dim() in (2, 3) and not any(t.method.any_shape and not t.method.name for t in live)
