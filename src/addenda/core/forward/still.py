"""Stand-ins of adapters that change nothing: what a compiled forward runs where no adapter acts.

A compiled forward with an adapter is one graph, and the base alone is another. So that switching adapters off compiles
nothing, the base runs the graph of the adapter that acted last, with trained tensors for which ΔW is 0: all of them
zero, or, where that is no change of nothing (a trained magnitude), the matrices zero and the vectors as at the start.
Whether ΔW is 0 then is computed, once for each method and shape; for a method where it is not, the base has a graph of
its own. The zeros are views of one buffer as long as the longest tensor.

A graph guards shapes, strides, dtypes and whether gradients are wanted, so a stand-in's tensors agree in all of these.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import Params, WeightMethod, to_float
from addenda.core.packed.tensor import Packed
from addenda.core.site.site import Point, Site

_VECTORS: dict[tuple, bool | None] = {}  # by method and shape: whether vectors are as at the start; None: no stand-in


class Stills:
    """The stand-ins of one model's tensors, made as they are asked for."""

    def __init__(self, sites: Iterable[tuple[Site, SiteTensors]]):
        self._sites = {id(t): site for site, t in sites}
        self._made: dict[int, SiteTensors | None] = {}
        self._zeros: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def of(self, tensors: tuple[SiteTensors, ...]) -> tuple[SiteTensors, ...]:
        """Return the stand-ins of the tensors that act at one parameter; () where one of them has none."""
        made = [self._one(t) for t in tensors]
        return tuple(t for t in made if t is not None) if None not in made else ()

    def _one(self, t: SiteTensors) -> SiteTensors | None:
        if id(t) not in self._made:
            site = self._sites.get(id(t))
            self._made[id(t)] = None if site is None else self._stand_in(t, site)
        return self._made[id(t)]

    def _stand_in(self, t: SiteTensors, site: Site) -> SiteTensors | None:
        held = t._parameters.values()
        if isinstance(site, Point) or not isinstance(t.method, WeightMethod) or t.method.bits is not None:
            return None
        if any(p is None or isinstance(p, Packed) or p.numel() == 0 for p in held):
            return None
        key = (t.method, site.kind, tuple(site.stored))
        if key not in _VECTORS:
            _VECTORS[key] = next((v for v in (False, True) if _changes_nothing(self._twin(t, site, v), site)), None)
        vectors = _VECTORS[key]
        return None if vectors is None else self._twin(t, site, vectors)

    def _twin(self, t: SiteTensors, site: Site, vectors: bool) -> SiteTensors | None:
        """Return the same tensors with others in the place of trained ones. vectors: from the start, where they can."""
        fresh: Params = {}
        if vectors:
            if (
                t.stacked
                or t.method.calibration is not None
                or all(p is None or p.dim() > 1 for p in t._parameters.values())
            ):
                return None
            W = site.matrix
            known = {k: v for k, v in t.held().items() if k not in t._parameters}
            fresh = t.method.init(W.to(torch.promote_types(W.dtype, torch.float32)), Stream(0, site.path), known)
        twin = object.__new__(SiteTensors)
        twin.__dict__.update(t.__dict__)
        own = {}
        for name, p in t._parameters.items():
            assert p is not None
            zero = self._zero(p)
            if p.dim() <= 1 and name in fresh:
                zero = fresh[name].detach().to(p)
            own[name] = nn.Parameter(zero, p.requires_grad)
            if p.requires_grad:
                own[name].register_post_accumulate_grad_hook(_forget)
        twin.__dict__["_parameters"] = own
        return twin

    def _zero(self, p: Tensor) -> Tensor:
        """Return zeros of a tensor's shape and strides: a view."""
        length = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        key = (p.dtype, p.device)
        if key not in self._zeros or self._zeros[key].numel() < length:
            self._zeros[key] = p.new_zeros(length)
        return self._zeros[key].as_strided(p.shape, p.stride())


def _forget(p: Tensor) -> None:
    p.grad = None


def _changes_nothing(t: SiteTensors | None, site: Site) -> bool:
    if t is None:
        return False
    W = site.matrix.float()
    p = to_float(t.tensors())
    if t.stacked:
        W, p = W[0], {k: v if k in t.shared else v[0] for k, v in p.items()}
    return not bool(t.method.delta(W, p).any())
