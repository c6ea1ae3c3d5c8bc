"""Building the tensors of an adapter at every site, before anything of the model changes."""

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
    """Build the tensors of every site by path, fresh or of a file (stored, pools); the model is not touched.

    seen: what calibration saw of a site, or the positions that were given for it, by path.

    Where they are computed from W, several sites are done at a time: a factorisation keeps one core busy, not more.
    """
    drawn, shared_pools, placed = {}, {}, {}
    for m in dict.fromkeys(m for _, m in plan):
        sites = [site for site, method in plan if method == m]
        shapes: list[Shape] = [site.shape for site in sites]
        drawn[m] = m.shared(shapes, Stream(seed, "shared")) if m.has("shared") else {}
        shared_pools[m] = pool_of(m, sites, seed, (pools or {}).get(m))
    jobs = []
    for site, m in plan:
        saved = None if stored is None else stored[site.path]
        place = (m, site.weight.device, site.weight.dtype)
        if place not in placed:  # once, so that all sites hold the same tensors
            placed[place] = kept_as(drawn[m], site)
        jobs.append((site, m, seed, placed[place], (seen or {}).get(site.path), saved, shared_pools[m]))
    built = {}
    with side_by_side(len(plan) if any(m.has("derive") for _, m in plan) else 1) as map_jobs:
        for i, (job, tensors) in enumerate(zip(jobs, map_jobs(lambda job: tensors_of(*job), jobs), strict=True)):
            built[job[0].path] = tensors
            if progress:
                progress(i, len(plan), job[0].path)
    if progress:
        progress(len(plan), len(plan), "")
    return built


def pool_of(m: Method, sites: list[Site], seed: int, stored: Params | None = None) -> Pool | None:
    """Return the tensors that the sites train together, fresh or stored; None for most methods.

    Raises AddendaError where the sites are on several devices.
    """
    if not m.has("pool"):
        return None
    places = {site.weight.device: site.path for site in sites}
    if len(places) > 1:
        listing = " and ".join(f"{path} on {device}" for device, path in list(places.items())[:2])
        raise AddendaError(f"{m.name} trains tensors that all sites share, and they are on several devices: {listing}.")
    tensors = m.pool([site.shape for site in sites], Stream(seed, "pool")) if stored is None else stored
    return Pool(m, {k: t.detach().to(sites[0].weight.device) for k, t in tensors.items()})


def numbers(site: Site, method: Method) -> int:
    """Return how many numbers a method trains at a site; no tensor is made."""
    whole = isinstance(method, WeightMethod) and method.any_shape
    return (1 if whole else site.copies) * method.trainable(*shape_of(site, method))


def shape_of(site: Site, method: Method) -> tuple[int, ...]:
    """Return a site's shape as its method's formulas take it; a stack, seen whole, counts as one column."""
    whole = isinstance(method, WeightMethod) and method.any_shape
    return (site.weight.numel(), 1) if whole and site.copies > 1 else site.shape


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
    """Return a method's tensors at one site: drawn by `init`, or those of a file; what is derived is made from W.

    shared: the tensors that all sites share. seen: what `calibrate` saw here, or the positions given for the site; None
    for neither. stored: the trained and frozen tensors of a file. A stack of matrices is made one matrix at a time.
    """
    device, dtype = site.weight.device, site.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    views: list[Any]  # the site as its method sees it: one matrix, or each of a stack; a width
    if isinstance(site, Point):
        single, views = True, [site.width]
    else:
        matrix = site.matrix
        single = not isinstance(m, WeightMethod) or m.any_shape or matrix.dim() < 3
        views = [matrix] if single else list(matrix)
    parts: list[tuple[Params, Params]] = []
    for e, view in enumerate(views):
        view = view.to(wide) if isinstance(view, Tensor) else view
        rng = Stream(seed, site.key) if single else Stream(seed, site.key, str(e))
        derived = _derived(site, m, view, rng)
        if stored is None:
            inputs = shared | derived | ({} if pool is None else pool.stored())
            if seen is not None:
                inputs = inputs | {"calibration" if m.calibration else "positions": seen if single else seen[e]}
            params = m.init(view, rng, inputs)
            if m.bits is not None:
                params = _in_few_bits(params, rng)
        else:
            params = {}
        parts.append((params, derived))
    params, derived = parts[0]
    if not single:
        params = {k: _stack([o[k] for o, _ in parts]) for k in params}
        derived = {k: _stack([d[k] for _, d in parts]) for k in derived}
    params = params if stored is None else stored
    moved = {
        k: nn.Parameter(t.detach().to(device)) if isinstance(t, nn.Parameter) else t.to(device)
        for k, t in params.items()
    }
    return SiteTensors(m, moved, kept_as(derived, site), shared, pool, not single)


def _in_few_bits(params: Params, rng: Stream) -> Params:
    """Replace matrices of zeros, which have no codes, by N(0, 0.001) cut at ± 0.002, as in the paper's code."""
    return {
        k: nn.Parameter(rng.trunc_normal(*t.shape, std=1e-3))
        if isinstance(t, nn.Parameter) and t.dim() > 1 and not bool(t.any())
        else t
        for k, t in params.items()
    }


def _derived(site: Site, m: Method, W: Any, rng: Stream) -> Params:
    try:
        if site.beside:
            return m.derive_beside(W, rng, {n: neighbour.matrix.to(W.dtype) for n, neighbour in site.beside.items()})
        return m.derive(W, rng) if m.has("derive") else {}
    except AddendaError as error:
        raise AddendaError(f"{site.path}: {error}") from None


def kept_as(tensors: Params, site: Site) -> Params:
    """Return derived and shared tensors as a site keeps them: on its device, matrices in the base's dtype.

    Vectors cost nothing and stay as they are. A product then needs no cast that would be kept for backward. Row by row,
    as a file has them, so that what is stored with basis=True sums in the same order.
    """
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
    """Return a site's tensors as a fresh `init` makes them, float32, trainable and frozen, without those of a pool."""
    try:
        with torch.device("meta"), torch.no_grad():
            return _blank(site, method)
    except Exception:  # whatever a method does with values that are not there
        sample = None if isinstance(site, Point) else stand_in(method, site.matrix.float())
        fresh = build_tensors([(site, method)], 0, seen=None if sample is None else {site.path: sample})[site.path]
        fresh._modules.pop("pool", None)
        return fresh


def _blank(site: Site, method: Method) -> SiteTensors:
    shapes, stack = [site.shape], 0
    if isinstance(site, Point):
        params = method.init(site.width, Blank(), _known(method, shapes))
        return SiteTensors(method, params, {}, {})
    W = site.kind.to_matrix(torch.empty(site.stored))
    if isinstance(method, WeightMethod) and not method.any_shape and W.dim() == 3:
        stack, W = len(W), W[0]
    inputs, sample = _known(method, shapes), stand_in(method, W)
    params = method.init(W, Blank(), inputs if sample is None else inputs | {"calibration": sample})
    return SiteTensors(
        method, {k: _times(t, stack) for k, t in params.items()} if stack else params, {}, {}, None, stack > 0
    )


def _known(method: Method, shapes: list[Shape]) -> Params:
    """Return what `init` may read beside the site: tensors that all sites share, none that is derived from values."""
    return method.shared(shapes, Blank()) | {k: t.detach() for k, t in method.pool(shapes, Blank()).items()}


def pool_template(method: Method, shapes: list[Shape]) -> Params:
    """Return the tensors of a fresh `pool` of these sites, without values."""
    with torch.device("meta"), torch.no_grad():
        return method.pool(shapes, Blank())


def _times(t: Tensor, count: int) -> Tensor:
    stacked = torch.empty(count, *t.shape, dtype=t.dtype)
    return nn.Parameter(stacked) if isinstance(t, nn.Parameter) else stacked
