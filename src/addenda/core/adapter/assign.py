"""Assigning methods to sites, before anything of the model changes."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from addenda.core.adapter.build import Assigned, shape_of
from addenda.core.adapter.dry_forward import dry_forward
from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from addenda.core.method.catalogue import Info, build
from addenda.core.method.contract import Method, Replace, WeightMethod
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.ours import is_ours
from addenda.core.site.kinds import EMBEDDING, PARAMETER
from addenda.core.site.site import Point, Site, refusal, site_at, with_neighbours
from addenda.core.site.structure import points
from addenda.core.site.targets import Target, all_paths, listed, matching, refuse_foreign, resolve

Spec = Method | str | Info


def assign(
    model: nn.Module,
    method: Spec | Mapping[Target, Spec],
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    also_train: Iterable[Target] = (),
    head_bits: int | None = None,
) -> tuple[Assigned, tuple[str, ...]]:
    """Return each site with its method, in the model's order, and the paths of `also_train` among them.

    Raises AddendaError listing every site that its method cannot take, with the reasons.
    """
    refuse_foreign(model)
    heads = [site for target in listed(also_train) for site in _parameters_of(model, target)]
    copy = Replace(bits=head_bits)
    if head_bits is not None and not heads:
        raise AddendaError(f"head_bits={head_bits} is for the heads that also_train names, and it names none.")
    owned = {id(site.weight) for site in heads}
    plan: dict[str, tuple[Site, Method]] = {}
    changed: set[int] = set()
    if isinstance(method, Mapping) and targets is not None:
        raise AddendaError("With {target: method} every method names its own targets; leave targets= out.")
    if isinstance(method, Mapping) and not method:
        raise AddendaError("{target: method} names no target. Give one, or a method alone for its own targets.")
    groups = method.items() if isinstance(method, Mapping) else [(targets, method)]
    for target, spec in groups:
        chosen = build(spec) if isinstance(spec, str) else spec.build() if isinstance(spec, Info) else spec
        if not isinstance(chosen, Method):
            raise AddendaError(f"Expected a method such as addenda.catalogue() lists, or its name, got {chosen!r}.")
        named = chosen.targets if target is None else target
        for candidate in _sites_of(model, chosen, named, exclude):
            site = with_neighbours(model, candidate, chosen.beside(candidate.path))
            if site.changed in changed:
                raise AddendaError(f"{site.path} is named by two targets; exclude it from one of them.")
            changed.add(site.changed)
            if site.changed not in owned:
                plan[site.path] = (site, chosen)
    if not plan:
        raise AddendaError("also_train takes every site that the targets name, so nothing is left for the method.")
    problems = [f"{site.path}: {reason}" for site, m in plan.values() if (reason := unfit(site, m))]
    problems += [f"{site.path}: {reason}" for site in heads if (reason := refusal(model, site) or unfit(site, copy))]
    if problems:
        ending = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AddendaError(
            f"{len(problems)} of {len(plan) + len(heads)} sites cannot take the method: "
            f"{'; '.join(problems[:8])}{ending}. "
            "Leave them out with exclude=, or give them another method with {target: method}."
        )
    for site in heads:
        plan[site.path] = (site, copy)
    order = {path: i for i, path in enumerate(all_paths(model))}
    plan = dict(sorted(plan.items(), key=lambda item: order.get(item[1][0].weight_path, len(order))))
    return list(plan.values()), tuple(dict.fromkeys(site.path for site in heads))


def _sites_of(model: nn.Module, method: Method, targets, exclude: Iterable[Target]) -> list[Site]:
    if isinstance(method, HiddenMethod):
        return list(points(model, method, targets, exclude, dry_forward))
    return resolve(model, targets, exclude)


def _parameters_of(model: nn.Module, target: Target) -> list[Site]:
    """Return every parameter, as a site, of the modules (of any class) that a target of `also_train` names."""
    named = dict(model.named_modules())
    paths = [p for p in named if p and isinstance(target, str) and (p == target or p.endswith(f".{target}"))]
    if not paths:
        paths = matching(model, target) or [s.path for s in resolve(model, target)]  # raises if nothing is there
    sites = []
    for path in paths:
        parameters = [f"{path}.{n}" for n, _ in named[path].named_parameters()] if path in named else [path]
        sites += [site_at(model, p) for p in parameters if not is_ours(p)]
    return sites


def unfit(site: Site, method: Method) -> str | None:
    """Return why this site cannot take this method, or None."""
    slots = slots_of(site.module)
    if slots is not None and slots.kinds.get(site.parameter, site.kind) != site.kind:
        kind = slots.kinds[site.parameter].name
        return f"another adapter holds this weight as a {kind}, not as a {site.kind.name}; detach it first"
    if not isinstance(method, WeightMethod):
        if not isinstance(site, Point):
            return f"{method.name} changes what a module returns, and this is a weight"
        return method.check(*site.shape)
    if isinstance(site, Point):
        return f"{method.name or 'a whole copy'} changes weights, and this is what a module returns"
    if method.dropout > 0 and (site.kind == PARAMETER or site.kind == EMBEDDING):
        return f"dropout acts on the input of a product, and a {site.kind.name} has none; use dropout=0 here"
    if not method.any_shape:
        if site.weight.dim() < 2:
            return f"a vector of {site.weight.numel()} is no matrix"
        if site.kind == PARAMETER and site.weight.dim() > 3:
            return f"a raw parameter of {site.weight.dim()} dimensions is neither a matrix nor a stack of matrices"
    if (names := method.beside(site.path)) and not site.beside:
        return f"with these options {method.name} looks at the weight of {' or '.join(names)} beside it; there is none"
    return method.check(*shape_of(site, method))


def check_bits(found: Iterable[tuple[Method, bool]]) -> None:
    """Raise AddendaError where bits have no matrix. found: each site's method, and whether it trains a matrix there."""
    trains: dict[Method, bool] = {}
    for m, has in found:
        trains[m] = trains.get(m, False) or has
    for m in (m for m, has in trains.items() if m.bits is not None and not has):
        raise AddendaError(f"bits={m.bits} is for trained matrices, and {m.name or 'the head'} trains vectors only.")


def allotted(plan: Assigned, seen: dict[str, Tensor]) -> Assigned:
    """Return the plan after methods have handed out among their sites what calibration, or their options, suggest.

    A method whose calibration has not been (for a plan) keeps all its sites.
    """
    assigned: dict[str, Method | None] = {}
    for m in dict.fromkeys(m for _, m in plan if m.has("allot")):
        sites = [site for site, method in plan if method == m]
        if m.calibration is not None and any(site.path not in seen for site in sites):
            continue
        looked = [] if m.calibration is None else [seen[site.path] for site in sites]
        methods = m.allot([shape_of(site, m) for site in sites], looked)
        assigned.update(zip((site.path for site in sites), methods, strict=True))
    revised = [(site, assigned.get(site.path, m)) for site, m in plan]
    problems = [f"{s.path}: {why}" for s, m in revised if m is not None and (why := m.check(*shape_of(s, m)))]
    if problems:
        raise AddendaError(f"What calibration suggests does not fit {len(problems)} sites: {'; '.join(problems[:8])}.")
    return [(site, m) for site, m in revised if m is not None]
