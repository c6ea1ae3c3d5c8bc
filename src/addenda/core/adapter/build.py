"""The tensors of an adapter: what its method makes of every site, before anything of the model changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from addenda.core.adapter.calibration import stand_in
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.base.threads import side_by_side
from addenda.core.forward.tensors import Pool, SiteTensors
from addenda.core.method.contract import Method, Params, Shape, WeightMethod
from addenda.core.site.site import Point, Site

Assigned = list[tuple[Site, Method]]
BuildProgress = Callable[[int, int, str], None]  # (done, total, path)


def build_tensors(
    plan: Assigned,
    seed: int,
    progress: BuildProgress | None = None,
    *,
    seen: dict[str, Tensor] | None = None,
    stored: dict[str, Params] | None = None,
    pools: dict[Method, Params] | None = None,
) -> dict[str, SiteTensors]:
    """The tensors of every site by path: fresh ones, or those of a file (stored, pools); the model is not touched.

    Where they are computed from W, several sites are done at a time: a factorisation keeps one core busy, not more.
    """
    drawn, held, placed = {}, {}, {}
    for m in dict.fromkeys(m for _, m in plan):
        sites = [site for site, own in plan if own == m]
        shapes: list[Shape] = [site.shape for site in sites]
        drawn[m] = m.shared(shapes, Stream(seed, "shared")) if m.has("shared") else {}
        held[m] = pool_of(m, sites, seed, (pools or {}).get(m))
    jobs = []
    for site, m in plan:
        given = None if stored is None else stored[site.path]
        where = (m, site.weight.device, site.weight.dtype)
        if where not in placed:  # once, so that all sites hold the same tensors
            placed[where] = kept_as(drawn[m], site)
        jobs.append((site, m, seed, placed[where], (seen or {}).get(site.path), given, held[m]))
    built = {}
    with side_by_side(len(plan) if any(m.has("derive") for _, m in plan) else 1) as each:
        for i, (job, tensors) in enumerate(zip(jobs, each(lambda job: tensors_of(*job), jobs), strict=True)):
            built[job[0].path] = tensors
            if progress:
                progress(i, len(plan), job[0].path)
    if progress:
        progress(len(plan), len(plan), "")
    return built


def pool_of(m: Method, sites: list[Site], seed: int, stored: Params | None = None) -> Pool | None:
    """What the sites train together, fresh or stored; None for most methods.

    Raises AddendaError where the sites are on several devices.
    """
    if not m.has("pool"):
        return None
    places = {site.weight.device: site.path for site in sites}
    if len(places) > 1:
        where = " and ".join(f"{path} on {device}" for device, path in list(places.items())[:2])
        raise AddendaError(f"{m.name} trains tensors that all sites share, and they are on several devices: {where}.")
    tensors = m.pool([site.shape for site in sites], Stream(seed, "pool")) if stored is None else stored
    return Pool(m, {k: t.detach().to(sites[0].weight.device) for k, t in tensors.items()})


def numbers(site: Site, method: Method) -> int:
    """How many numbers a method trains at a site; nothing is made."""
    if isinstance(method, WeightMethod) and method.any_shape:
        return site.weight.numel()
    return site.copies * method.trainable(*site.shape)


@torch.no_grad()
def tensors_of(
    site: Site,
    m: Method,
    seed: int,
    shared: Params,
    seen: Tensor | None,
    stored: Params | None,
    pool: Pool | None = None,
) -> SiteTensors:
    device, dtype = site.weight.device, site.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    given: list[Any]  # the site as its method sees it: one matrix, or each of a stack; a width
    if isinstance(site, Point):
        single, given = True, [site.width]
    else:
        matrix = site.matrix
        single = not isinstance(m, WeightMethod) or m.any_shape or matrix.dim() < 3
        given = [matrix] if single else list(matrix)
    parts: list[tuple[Params, Params]] = []
    for e, what in enumerate(given):
        what = what.to(wide) if isinstance(what, Tensor) else what
        rng = Stream(seed, site.path) if single else Stream(seed, site.path, str(e))
        derived = _derived(site, m, what, rng)
        if stored is None:
            known = shared | derived | ({} if pool is None else pool.stored())
            if seen is not None:
                known = known | {"calibration": seen if single else seen[e]}
            own = m.init(what, rng, known)
            if m.bits is not None:
                own = _in_few_bits(own, rng)
        else:
            own = {}
        parts.append((own, derived))
    own, derived = parts[0]
    if not single:
        own = {k: _stack([o[k] for o, _ in parts]) for k in own}
        derived = {k: _stack([d[k] for _, d in parts]) for k in derived}
    own = own if stored is None else stored
    moved = {
        k: nn.Parameter(t.detach().to(device)) if isinstance(t, nn.Parameter) else t.to(device) for k, t in own.items()
    }
    return SiteTensors(m, moved, kept_as(derived, site), shared, pool, not single)


def _in_few_bits(own: Params, rng: Stream) -> Params:
    """Matrices of zeros, which have no codes, start from N(0, 0.001) cut at ± 0.002, as in the paper's code."""
    return {
        k: nn.Parameter(rng.trunc_normal(*t.shape, std=1e-3))
        if isinstance(t, nn.Parameter) and t.dim() > 1 and not bool(t.any())
        else t
        for k, t in own.items()
    }


def _derived(site: Site, m: Method, W: Any, rng: Stream) -> Params:
    try:
        if site.beside:
            return m.derive_beside(W, rng, {n: other.matrix.to(W.dtype) for n, other in site.beside.items()})
        return m.derive(W, rng) if m.has("derive") else {}
    except AddendaError as error:
        raise AddendaError(f"{site.path}: {error}") from None


def kept_as(tensors: Params, site: Site) -> Params:
    """Derived and shared tensors as a site keeps them: on its device, matrices in the base's dtype (vectors cost
    nothing and stay as they are). A product then needs no cast that would be kept for backward. Row by row, as a file
    has them, so that what is stored with basis=True sums in the same order."""
    like = site.weight
    return {
        k: t.to(like.device, like.dtype if t.is_floating_point() and t.dim() > 1 else t.dtype).contiguous()
        for k, t in tensors.items()
    }


def _stack(tensors: list[Tensor]) -> Tensor:
    stacked = torch.stack([t.detach() for t in tensors])
    return nn.Parameter(stacked) if isinstance(tensors[0], nn.Parameter) else stacked


class Blank(Stream):
    """A stream whose tensors have a shape and a dtype, and no values."""

    def __init__(self):
        super().__init__(0, "blank")

    def fork(self, key: str) -> "Blank":
        return self

    def raw(self, n: int) -> np.ndarray:
        return np.broadcast_to(np.uint64(0), (n,))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.empty(shape, device="meta")

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, device="meta")

    def trunc_normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, device="meta")

    def deal(self, n: int, parts: int) -> Tensor:
        return torch.empty(n, dtype=torch.int8 if parts <= 127 else torch.int16, device="meta")

    def choice(self, n: int, k: int) -> Tensor:
        return torch.empty(k, dtype=torch.int64, device="meta")


def template(site: Site, method: Method) -> SiteTensors:
    """What a fresh `init` holds at a site, in float32: trainable and frozen tensors, without those of a pool."""
    try:
        with torch.device("meta"), torch.no_grad():
            return _blank(site, method)
    except Exception:  # whatever a method does with values that are not there
        seen = None if isinstance(site, Point) else stand_in(method, site.matrix.float())
        made = build_tensors([(site, method)], 0, seen=None if seen is None else {site.path: seen})[site.path]
        made._modules.pop("pool", None)
        return made


def _blank(site: Site, method: Method) -> SiteTensors:
    shapes, stack = [site.shape], 0
    if isinstance(site, Point):
        own = method.init(site.width, Blank(), _known(method, shapes))
        return SiteTensors(method, own, {}, {})
    W = site.kind.to_matrix(torch.empty(site.stored))
    if isinstance(method, WeightMethod) and not method.any_shape and W.dim() == 3:
        stack, W = len(W), W[0]
    known, seen = _known(method, shapes), stand_in(method, W)
    own = method.init(W, Blank(), known if seen is None else known | {"calibration": seen})
    return SiteTensors(method, {k: _times(t, stack) for k, t in own.items()} if stack else own, {}, {}, None, stack > 0)


def _known(method: Method, shapes: list[Shape]) -> Params:
    """What `init` may read beside the site: tensors that all sites share. What is derived from values is not there."""
    return method.shared(shapes, Blank()) | {k: t.detach() for k, t in method.pool(shapes, Blank()).items()}


def pool_template(method: Method, shapes: list[Shape]) -> Params:
    """What a fresh `pool` of these sites holds."""
    with torch.device("meta"), torch.no_grad():
        return method.pool(shapes, Blank())


def _times(t: Tensor, count: int) -> Tensor:
    stacked = torch.empty(count, *t.shape, dtype=t.dtype)
    return nn.Parameter(stacked) if isinstance(t, nn.Parameter) else stacked
