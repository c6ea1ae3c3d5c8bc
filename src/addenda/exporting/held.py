"""What a door has read, at the sites as which a model's adapters hold the same weights.

A weight is changed where its layer is called ("mlp.up_proj") or as a raw parameter ("mlp.up_proj.weight"); a model
holds it one way at a time, and a door reads it one way whichever was written. Beside a live adapter it takes the other.
"""

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from addenda.core.method.contract import Method, Params, Replace
from addenda.core.site.kinds import PARAMETER
from addenda.core.site.site import Owners, Site, owners_of, site_at
from addenda.exporting.install import Forms
from addenda.methods.lora import LoRA


def as_held(forms: Forms, root: nn.Module) -> Forms:
    """Return the forms with every weight that an adapter of the model holds at the site as which it does."""
    owners, found = owners_of(root), Forms(pools=forms.pools, notes=forms.notes)
    for path, (method, p) in forms.sites.items():
        at, tensors = _held(root, path, method, p, owners)
        found.sites[at] = method, tensors
    for path, p in forms.heads.items():
        at, tensors = _held(root, path, Replace(), p, owners)
        found.heads[at] = tensors
    return found


def _held(root: nn.Module, path: str, method: Method, p: Params, owners: Owners) -> tuple[str, Params]:
    """Return where a site's weight is held, and the tensors there; `install` refuses what the model has not."""
    try:
        site = site_at(root, path, owners)
        slots = slots_of(site.module)
        if slots is None or slots.kinds.get(site.parameter, site.kind) == site.kind:
            return path, p
        layer = site.path.rpartition(".")[0]
        other = site_at(root, layer if site.kind == PARAMETER else f"{path}.{site.parameter}", owners)
    except AddendaError:
        return path, p
    return other.path, _seen(method, p, site, other)


def _seen(method: Method, p: Params, site: Site, other: Site) -> Params:
    """Return the tensors of a site as another kind of site of the same weight has them."""
    if isinstance(method, Replace):
        return {"value": other.kind.to_matrix(site.kind.from_matrix(p["value"], site.weight))}
    if isinstance(method, LoRA) and site.kind.transposed != other.kind.transposed:
        return {"B": p["A"].mT, "A": p["B"].mT}
    return p
