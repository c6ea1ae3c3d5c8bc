"""Which convolutions and linear layers are trained low rank and factorised, and why the others are not.

A role ("conv", "linear", …) leaves out what the paper does: the first convolution, those of 1 × 1, and output heads. A
glob, path or predicate takes what it names.
"""

from collections.abc import Iterable

from torch import nn

from addenda.compressing.schemes import Place, scheme_called
from addenda.core.base.errors import AddendaError
from addenda.core.modules.wrappers import model_in
from addenda.core.packed.tensor import Packed
from addenda.core.site.kinds import CONV, CONV1D, LINEAR, PARAMETER, kind_of
from addenda.core.site.site import owners_of, refusal, site_at
from addenda.core.site.targets import ROLES, Target, called, grouped, listed, matching


def candidates(
    model: nn.Module, targets: Target | Iterable[Target] = "conv", exclude: Iterable[Target] = (),
    scheme: str = "channel",
) -> tuple[dict[str, Place], dict[str, str]]:  # fmt: skip
    """Return ({path: place} to factorise, {path: reason} of convolutions and linear layers that are not).

    Raises AddendaError for an unknown scheme, a target that matches nothing, and when no layer is left, with the
    reasons.
    """
    model_in(model)
    conv_scheme, owners = scheme_called(scheme), owners_of(model)
    outright, by_role = _wanted(model, targets)
    left_out = set().union(*_wanted(model, exclude, "exclude: "))
    convolutions = [p for p, m in called(model) if kind_of(m) == CONV]
    spread = [p for p in convolutions if set(model.get_submodule(p).kernel_size) != {1}]  # type: ignore[arg-type]
    places: dict[str, Place] = {}
    dense: dict[str, str] = {}
    for path, module in called(model):
        kind = kind_of(module)
        if kind not in (CONV, LINEAR, CONV1D):
            continue
        if module._parameters.get("weight") is None:
            dense[path] = "its weight is computed from other parameters"
            continue
        site = site_at(model, path, owners)
        reason = None
        if path in left_out:
            reason = "excluded"
        elif path not in outright and path not in by_role:
            reason = "not among the targets (a role leaves out heads and routers)"
        elif path not in outright and kind == CONV and path not in spread:
            reason = "1 × 1: there is nothing to split off; name it to factorise it as a matrix"
        elif path not in outright and kind == CONV and path == spread[0]:
            reason = "the first convolution, which sees the input itself; name it to take it too"
        elif kind == CONV and not isinstance(module, nn.Conv2d):
            reason = f"a {type(module).__name__}: only convolutions over two dimensions are factorised"
        elif site.kind == PARAMETER:
            reason = "its weight is read without calling the layer"
        elif isinstance(site.weight, Packed):
            reason = "its weight is packed"
        elif why := refusal(model, site, owners):
            reason = why.partition(";")[0]
        elif type(module) not in (nn.Conv2d, nn.Linear) and type(module).__name__ != "Conv1D":
            reason = f"a {type(module).__name__} may do more than its product"
        if reason is None:
            place = Place(site, conv_scheme if kind == CONV else None)
            if place.per_rank() < place.dense():
                places[path] = place
                continue
            reason = "no rank of it saves parameters"
        dense[path] = reason
    if not places:
        listed = "; ".join(f"{p}: {why}" for p, why in list(dense.items())[:8]) or "it has none"
        raise AddendaError(
            f"No convolution or linear layer of this {type(model).__name__} can be factorised: {listed}. Name others "
            "with targets=."
        )
    return places, dense


def _wanted(model: nn.Module, targets: Target | Iterable[Target], what: str = "") -> tuple[set[str], set[str]]:
    """Return paths named outright, and those that a role gives. Raises AddendaError for a target without any."""
    outright: set[str] = set()
    by_role: set[str] = set()
    for target in listed(targets):
        paths = matching(model, target)
        if not paths and target != "conv":  # a model without any says so with its reasons
            groups = grouped(p for p, m in called(model) if kind_of(m) in (CONV, LINEAR, CONV1D))
            raise AddendaError(
                f"{what}The target {target!r} matches nothing in this {type(model).__name__}. Its convolutions and "
                f"linear layers: "
                f"{', '.join(groups) or 'none'}."
            )
        (by_role if target in ROLES else outright).update(paths)
    return outright, by_role
