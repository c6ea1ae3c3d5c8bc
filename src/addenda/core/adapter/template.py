"""The tensors that a method would have at a site, for their names, kinds and shapes: nothing is drawn or computed.

`init` is run on the meta device, with a stream that gives shapes and no numbers. So no weight has to be made up, which
a method could refuse, and no decomposition is paid for. A method whose `init` looks at values (none of the catalogue)
is given the site's own weight, which is what it was attached to.
"""

import numpy as np
import torch
from torch import Tensor, nn

from addenda.core.adapter.build import build_tensors
from addenda.core.adapter.calibration import stand_in
from addenda.core.base.random import Stream
from addenda.core.forward.adapted import SiteTensors
from addenda.core.method.contract import Method, Params, Shape, WeightMethod
from addenda.core.site.site import Point, Site


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
