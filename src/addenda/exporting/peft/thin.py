"""Which of our methods are a product of two thin matrices, of what rank, and these matrices."""

from functools import lru_cache

import torch
from torch import Tensor

from addenda.core.adapter.build import build_tensors
from addenda.core.adapter.calibration import stand_in
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, WeightMethod, to_float
from addenda.core.method.lowrank import LowRank
from addenda.core.site.kinds import LINEAR
from addenda.core.site.site import Site
from addenda.methods.delora import DeLoRA

_SIDE = 64  # a stand-in for a larger weight is at least as large as this, and as four ranks


def exact_rank(method: Method, site: Site) -> int | None:
    """Return the rank of the thin matrices whose product ΔW exactly is, or None where there are none such."""
    if not isinstance(method, WeightMethod) or not method.has("factors") or method.has("magnitude"):
        return None
    m, n = site.shape
    rank = _width(method, m, n)
    if rank is not None and isinstance(method, LowRank | DeLoRA):  # offsets from a start are twice as wide
        return min(rank, m, n)
    return rank if rank is not None and rank < min(m, n) else None


@lru_cache(256)
def _width(method: WeightMethod, m: int, n: int) -> int | None:
    """Return the width of a method's factors at an m × n weight; None where it cannot be there.

    Found at a small stand-in: it depends on the options, and at most on the narrower side.
    """
    side = max(_SIDE, 4 * int(getattr(method, "rank", 1)))
    small = tuple(min(size, side) for size in (m, n))
    if method.check(m, n) is not None:
        return None
    if method.check(*small) is not None:
        small = (m, n)
    layer = torch.nn.Linear(small[1], small[0], bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(small, generator=generator))
    site = Site("weight", layer, "weight", LINEAR)
    sample = stand_in(method, site.matrix)
    try:
        tensors = build_tensors([(site, method)], 0, seen=None if sample is None else {"weight": sample})["weight"]
    except AddendaError:
        return None
    width = method.factors(to_float(tensors.tensors()), small).pair()[0].shape[-1]
    return min(m, n) if width >= min(small) else width


def narrow(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product whose rank is no larger than the matrix is wide."""
    m, r, n = B.shape[-2], B.shape[-1], A.shape[-1]
    if r <= min(m, n):
        return B, A
    product = (B.double() @ A.double()).to(B.dtype)
    one = torch.eye(min(m, n), dtype=B.dtype).expand(*B.shape[:-2], -1, -1)
    return (one, product) if m <= n else (product, one)


def trimmed(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors without the ranks that are zero, such as those that a budget has taken away; one at least."""
    lives = (B != 0).flatten(0, -2).any(0) & (A != 0).movedim(-2, 0).flatten(1).any(1)
    lives[0] |= not bool(lives.any())
    return B[..., lives], A[..., lives, :]
