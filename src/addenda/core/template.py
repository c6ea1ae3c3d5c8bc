"""The tensors that a method would have at a site, made without the site's own weight: for their names and shapes."""

import torch
from torch import nn

from addenda.core.adapted import SiteTensors
from addenda.core.calibration import stand_in
from addenda.core.method import Method
from addenda.core.sites import Point, Site
from addenda.core.tensors import build_tensors


def template(site: Site, method: Method) -> SiteTensors:
    """Fresh tensors of a method, as for a weight of the site's shape and kind, in float32 on the CPU."""
    if isinstance(site, Point):
        return build_tensors([(site, method)], 0)[site.path]
    fake = torch.arange(float(site.weight.numel())).remainder_(7.0).reshape(site.matrix.shape)
    known = stand_in(method, fake)
    seen = None if known is None else {site.path: known}
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(site.kind.from_matrix(fake, site.weight), requires_grad=False)
    return build_tensors([(Site(site.path, layer, "weight", site.kind), method)], 0, seen=seen)[site.path]
