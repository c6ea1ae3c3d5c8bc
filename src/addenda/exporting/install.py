"""Attaching an adapter whose tensors are given: what a door has read, or what another adapter comes to."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from addenda.core.adapter.assign import unfit
from addenda.core.adapter.attach import install as register
from addenda.core.adapter.attach import ready
from addenda.core.adapter.build import Assigned, build_tensors, pool_template, template
from addenda.core.adapter.fit import fitting_tensors, form_of, form_text, not_sane
from addenda.core.adapter.handle import Adapter, fitting
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.method.contract import Method, Params, Replace, Shape
from addenda.core.site.site import Site, owners_of, refusal, site_at, with_neighbours
from addenda.core.site.targets import grouped
from addenda.core.state.state import record_of
from addenda.core.state.undo import undone

Given = Mapping[str, tuple[Method, Mapping[str, Tensor]]]  # of each path, a method and its tensors by name


@dataclass
class Forms:
    """An adapter that no model has yet: methods and tensors by path of the site, trained copies, what sites share."""

    sites: dict[str, tuple[Method, Params]] = field(default_factory=dict)
    heads: dict[str, Params] = field(default_factory=dict)  # {"value": the trained copy} by path of a parameter
    pools: dict[Method, Params] = field(default_factory=dict)  # tensors that all sites of a method train together
    notes: list[str] = field(default_factory=list)  # what was converted on the way, for people


@torch.no_grad()
def install(
    model: nn.Module,
    forms: Given,
    *,
    name: str,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    pools: Mapping[Method, Mapping[str, Tensor]] | None = None,
    trainable: bool = False,
    activate: bool = False,
    labels: Iterable[str] = (),
    seed: int = 0,
    what: str = "The adapter",
) -> Adapter:
    """Attach a new adapter with copies of these tensors: whole, or not at all.

    forms: of each path a method and its tensors (which of them are trained is the method's to say). heads: {"value"} of
    parameters that are trained as whole copies. pools: what all sites of a method train together. what: the adapter,
    for errors. Raises AddendaError that lists all sites which the model has not or which the method cannot take, and
    tensors of other names, shapes or kinds than a fresh start has, or not finite; then the model is as it was.
    """
    started, (root, state) = time.perf_counter(), ready(model, name)
    kept_labels = fitting(root, labels)
    copies = {path: (Replace(), p) for path, p in (heads or {}).items()}
    if both := copies.keys() & forms.keys():
        raise AddendaError(f"{what}: {min(both)} is given as a change and as a trained copy; nothing was attached.")
    plan, given = _plan(root, {**forms, **copies}, what), {**forms, **copies}
    own = {site.path: _own(site, m, given[site.path][1], what) for site, m in plan}
    fitting_tensors(plan, own, what)
    shared = _pools(plan, pools or {}, what)
    built = build_tensors(plan, seed, stored=own, pools=shared)
    with undone(root):
        adapter = register(root, state, name, plan, built, tuple(copies), seed, not state.records, started, activate)
        record_of(root, name).record.labels = kept_labels
        return adapter.requires_grad_(trainable)


def _plan(root: nn.Module, forms: Given, what: str) -> Assigned:
    """Return each site with its method, in the model's order. Raises AddendaError listing all that cannot be."""
    owners, problems, missing = owners_of(root), [], []
    found: dict[str, tuple[Site, Method]] = {}
    changed: dict[int, str] = {}
    for path, (method, _) in forms.items():
        try:
            site = with_neighbours(root, site_at(root, path, owners), method.beside(path), owners)
        except AddendaError:
            missing.append(path)
            continue
        if site.path != path or site.changed in changed:
            problems.append(f"{path}: in this model it is {changed.get(site.changed, site.path)} (tied or repeated)")
        elif reason := refusal(root, site, owners) or unfit(site, method):
            problems.append(f"{path}: {reason}")
        changed[site.changed] = path
        found[path] = site, method
    names = [n for n, _ in root.named_modules()]
    for pattern, paths in grouped(missing).items():
        problems.append(f"the model has no {pattern[:200]} ({len(paths)} sites).{nearest(paths[0], names, 1)}")
    if not forms:
        problems.append("it has no site")
    if problems:
        raise AddendaError(
            f"{what} does not fit this {type(root).__name__}, and nothing was attached. {len(problems)} problems: "
            f"{'; '.join(problems[:20])}{' …' if len(problems) > 20 else ''}"
        )
    order = {n: i for i, n in enumerate(names)}
    return sorted(found.values(), key=lambda item: order.get(_module_of(item[0].path, order), len(order)))


def _module_of(path: str, known: Mapping[str, int]) -> str:
    path = path.partition("@")[0]
    return path if path in known else path.rpartition(".")[0]


def _own(site: Site, method: Method, given: Mapping[str, Tensor], what: str) -> Params:
    """Return copies of a site's tensors, floating ones in float32, those that a fresh start trains as parameters.

    Raises AddendaError where such a one is of whole numbers.
    """
    trained = template(site, method)._parameters
    own: Params = {}
    for name, t in given.items():
        if name in trained and not t.is_floating_point():
            raise AddendaError(
                f"{what}: {site.path}/{name} is {str(t.dtype).removeprefix('torch.')}, and what is trained is of a "
                "floating dtype; nothing was attached."
            )
        copy = t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype, copy=True).contiguous()
        own[name] = nn.Parameter(copy) if name in trained else copy
    return own


def _pools(plan: Assigned, pools: Mapping[Method, Mapping[str, Tensor]], what: str) -> dict[Method, Params]:
    """Return copies of what sites train together, checked to be what a fresh start has."""
    methods = [m for m in dict.fromkeys(m for _, m in plan) if m.has("pool")]
    if set(methods) != set(pools):
        raise AddendaError(
            f"{what}: tensors that all sites share are given for {len(pools)} methods, and {len(methods)} have such; "
            "nothing was attached."
        )
    copies: dict[Method, Params] = {}
    for m in methods:
        shapes: list[Shape] = [site.shape for site, method in plan if method == m]
        copies[m] = {k: nn.Parameter(t.detach().to("cpu", torch.float32, copy=True)) for k, t in pools[m].items()}
        form, expected = ({k: form_of(t, True) for k, t in p.items()} for p in (copies[m], pool_template(m, shapes)))
        problems = [f"{k} {reason}" for k, t in copies[m].items() if (reason := not_sane(t, 0))]
        if form != expected:
            problems.append(f"expected {form_text(expected)}, got {form_text(form)}")
        if problems:
            raise AddendaError(f"{what}: what all sites of {m.name} share does not fit: {'; '.join(problems)}.")
    return copies
