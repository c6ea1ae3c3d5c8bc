"""Moving an adapter without training: its change copied, or carried over by both bases' singular subspaces.

    made = copied(adapter, target)                       # layer i to layer i, where shapes match
    made = projected(adapter, target, directions=64)     # any shapes
    print(made); made.adapter.save("start.safetensors")  # distil(…, start="start.safetensors") goes on from it

What a transfer has to be better than, and where one may begin. Of any method that changes weights the change itself is
taken, ΔW = B A where it has factors and dense where not, and the target gets a LoRA with it; what changes activations
is refused. With W_s = U_s Σ_s V_sᵀ and W_t = U_t Σ_t V_tᵀ, the k largest directions of each,

    copied       ΔW_t = ΔW_s
    projected    ΔW_t = U_t P (U_sᵀ ΔW_s V_s) Qᵀ V_tᵀ,   P = U_tᵀ U_s where both have as many outputs, else I;
                                                         Q = V_tᵀ V_s where both have as many inputs, else I

So at equal shapes ΔW_s is cut down to the source's subspaces, then to the target's, whatever the signs of singular
vectors. At others the i-th direction of the one stands for the i-th of the other, signs fixed by the largest entry: a
guess that nothing in the two bases supports, and a control. Factors go through thin products; no m × n matrix is made.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.base.ranges import MANY, Range
from addenda.core.modules.wrappers import unwrap
from addenda.core.site.site import Site, owners_of, refusal, site_at
from addenda.exporting.deltas import changed_sites, delta, thin_factors
from addenda.exporting.install import install
from addenda.exporting.reduced import is_matrix
from addenda.methods.lora import LoRA
from addenda.reducing.delta import Known, low_rank

Layers = Literal["same", "relative"]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXACT = 1e-6  # what a low rank may leave of ΔW where no rank is given


@dataclass(frozen=True)
class MovedSite:
    """A place of the target. source: whose change it has; kept: ‖ΔW_t‖ / ‖ΔW_s‖; error: what the rank cost."""

    path: str
    source: str
    rank: int
    kept: float
    error: float


@dataclass(frozen=True)
class Moved:
    """The new adapter on the target, which acts. left: places of the source that went nowhere, and why.

    fresh: places of the target that got a change of 0, to be trained.
    """

    adapter: Adapter
    sites: tuple[MovedSite, ...]
    left: Mapping[str, str]
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = sum(s.kept for s in self.sites) / len(self.sites)
        told = f"{len(self.sites)} places have {kept:.0%} of the source's change on average"
        if self.fresh:
            told += f", {len(self.fresh)} begin at 0"
        if self.left:
            told += f"; {len(self.left)} of the source's went nowhere, e.g. {next(iter(self.left.items()))}"
        return told


@checked()
def copied(
    adapter: Adapter,
    target: nn.Module,
    *,
    rank: int | None = None,
    layers: Layers = "same",
    fill: bool = False,
    name: str = "default",
    seed: int = 0,
) -> Moved:
    """Attach to the target what the adapter changes, where a place of the same path has the same shape.

    rank: of every place; the change is cut to it, or filled up with directions that begin at 0. None: as many as it
    takes. layers: "same" takes layer i of the source to layer i, as when the source is the target's first layers;
    "relative" to the layer at the same share of the depth. fill: places of the target in layers that the source lacks
    get a change of 0, so that distilling from here trains as many places as from nothing.
    Raises AddendaError, with the target as it was, for an adapter that changes activations, and where no place fits.
    """
    return _moved(adapter, target, lambda s, t, D: D if s.shape == t.shape else None, rank, layers, fill, name, seed)


@checked(special={"directions": Range(1, MANY, whole=True)})
def projected(
    adapter: Adapter,
    target: nn.Module,
    *,
    directions: int | None = None,
    rank: int | None = None,
    layers: Layers = "relative",
    fill: bool = False,
    name: str = "default",
    seed: int = 0,
) -> Moved:
    """Attach to the target the adapter's change as it is in both bases' leading singular subspaces; see the module.

    directions: k, of every weight, at most as many as both have; None: as many as both have. The rest as in `copied`.
    """

    def carried(source: Site, place: Site, D: Tensor | Known) -> Tensor | Known:
        k = min(*source.shape, *place.shape, directions or MANY)
        (Us, _, Vs), (Ut, _, Vt) = (singular_triplets(s.matrix, k) for s in (source, place))
        left = Ut @ (Ut.T @ Us) if len(Ut) == len(Us) else Ut  # m_t × k
        right = (Vs @ Vt.T) @ Vt if Vt.shape == Vs.shape else Vt  # k × n_t
        if isinstance(D, Tensor):
            return left @ (Us.T @ D @ Vs.T), right
        return left @ (Us.T @ D[0]), (D[1] @ Vs.T) @ right

    return _moved(adapter, target, carried, rank, layers, fill, name, seed)


Carry = Callable[[Site, Site, Tensor | Known], Tensor | Known | None]  # None: the shapes do not allow it


@torch.no_grad()
def _moved(
    adapter: Adapter,
    target: nn.Module,
    carry: Carry,
    rank: int | None,
    layers: Layers,
    fill: bool,
    name: str,
    seed: int,
) -> Moved:
    if layers not in ("same", "relative"):
        raise AddendaError(f"layers must be 'same' or 'relative', got {layers!r}.")
    if fill and rank is None:
        raise AddendaError("fill=True makes places that begin at 0, and they want a rank: give rank=.")
    held = {site.path: (site, tensors) for site, tensors in changed_sites(adapter)}
    root = unwrap(target)
    paths, owners = _places(held, root, layers), owners_of(root)
    left = dict.fromkeys(held, "the target has no such place")
    forms: dict[str, tuple[LoRA, dict[str, Tensor]]] = {}
    sites, fresh = [], []
    for path, origin in paths.items():
        place = site_at(root, path, owners)
        if place.path != path or refusal(root, place, owners) or place.matrix.dim() != 2:
            continue
        own = LoRA(rank=min(rank, *place.shape)) if rank else None
        start = {} if own is None else own.init(place.matrix.float(), Stream(seed, path), {})
        if origin is None:
            if fill and own is not None:
                fresh.append(path)
                forms[path] = own, {"A": start["A"].detach(), "B": start["B"].detach()}
            continue
        source, tensors = held[origin]
        if not is_matrix(source, [tensors]) or source.matrix.dim() != 2:
            left[origin] = "it is no single matrix"
            continue
        D = thin_factors(source, tensors) or delta(source, tensors)
        made, size = carry(source, place, D), _norm(D)
        if made is None:
            left[origin] = f"{path} is {list(place.shape)} and not {list(source.shape)}"
            continue
        left.pop(origin, None)
        thin = low_rank(made, rank=None if own is None else own.rank)
        A, B = thin.A.float(), thin.B.float()
        if own is not None and thin.rank < own.rank:
            A = torch.cat([A, start["A"].detach()[thin.rank :]])
            B = torch.cat([B, start["B"].detach()[:, thin.rank :]], 1)
        forms[path] = own or LoRA(rank=thin.rank), {"A": A, "B": B}
        kept = _norm((thin.B, thin.A)) / size if size else 1.0
        sites.append(MovedSite(path, origin, len(A), kept, thin.error))
    if not sites:
        why = next(iter(left.items()), ("it", "it changes no weight"))
        raise AddendaError(
            f"Nothing of {adapter.name!r} fits this {type(root).__name__}, and nothing was attached: {len(left)} "
            f"places of the source went nowhere, {why[0]} for one, since {why[1]}."
        )
    put = install(target, forms, name=name, activate=True, trainable=True, seed=seed, what="What was moved")
    return Moved(put, tuple(sites), left, tuple(fresh))


def _places(held: Mapping[str, object], root: nn.Module, layers: Layers) -> dict[str, str | None]:
    """Return {place of the target: the place of the source that it is of}, None for a layer that the source lacks.

    Places are alike up to their first number, which is the layer's.
    """
    patterns = {_NUMBER.sub("*", path, 1) for path in held}
    here = [path for path, _ in root.named_modules() if path in held or _NUMBER.sub("*", path, 1) in patterns]
    depths = [max((n + 1 for p in part if (n := _layer(p)) is not None), default=1) for part in (held, here)]
    found: dict[str, str | None] = {}
    for path in here:
        layer = _layer(path)
        if layer is not None and layers == "relative":
            layer = round(layer * (depths[0] - 1) / max(depths[1] - 1, 1))
        origin = path if layer is None else _NUMBER.sub(str(layer), path, 1)
        found[path] = origin if origin in held else None
    return found


def _layer(path: str) -> int | None:
    number = _NUMBER.search(path)
    return None if number is None else int(number[0])


def _norm(D: Tensor | Known) -> float:
    """Return ‖D‖, of factors by their small products."""
    if isinstance(D, Tensor):
        return float(D.norm())
    B, A = D
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())
