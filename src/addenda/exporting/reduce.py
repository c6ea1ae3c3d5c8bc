"""`reduce`: what adapters change, in fewer numbers: a LoRA, a sparse change, a few bits an entry, or an exact patch.

    adapters ──► ΔW = Σ ΔW_i of one site at a time ──► `reducing.delta` ──► an adapter of its own, idle beside them

It is made of any method that changes weights, and of several together, as the library sums them. Its sites are theirs.
Changes of vectors, and heads that were trained as whole copies, come along as copies. `weigh` gives the solver what the
layers are given: a LoRA then keeps what their outputs show, not what the weights do.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from addenda.core.adapter.attach import detach, ready
from addenda.core.adapter.handle import Adapter, refuse_part
from addenda.core.base.arguments import check_batches, checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.ranges import problems
from addenda.core.base.sharded import refuse_sharded
from addenda.core.forward.tensors import SiteTensors
from addenda.core.merge.judge import distance, divergence
from addenda.core.method.contract import Method
from addenda.core.modules.borrow import in_its_mode, training_mode
from addenda.core.packed.tensor import Packed, parts_of
from addenda.core.site.site import Site, owners_of, site_at
from addenda.core.state.state import acting_again, apply_active, intact, record_of
from addenda.exporting.deltas import refuse_hidden
from addenda.exporting.install import install
from addenda.exporting.probe import outputs_of, probe_of
from addenda.exporting.reduce_report import OutputError, ReducedSite, ReduceReport, some
from addenda.exporting.reduced import form_of, is_matrix, total_delta
from addenda.reducing.inputs import input_moments

To = Literal["lora", "sparse", "bits", "patch"]
READS = {"lora": ("rank", "energy", "weigh"), "sparse": ("density", "count", "weigh"), "bits": ("bits",), "patch": ()}


@checked()
@torch.no_grad()
def reduce(
    adapters: Adapter | Sequence[Adapter],
    to: To = "lora",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    count: int | None = None,
    bits: int | None = None,
    weigh: Iterable[object] | None = None,
    name: str = "reduced",
    probe: object | None = None,
) -> ReduceReport:
    """Attach what adapters of one model change together, ΣΔW, in a smaller form beside them, as `name`: idle.

    to="lora": rank (at most; narrower layers take theirs), or energy, the share of each site's ΔW to keep; neither: the
    lowest rank that gives ΔW back to 1e-6. "sparse": the density or the count of entries of each matrix, the largest.
    "bits": codes of 1 to 8 bits an entry (by default 1). "patch": the entries of the weight that differ from the base's
    once the change is written into its dtype, exactly as `merge` would write it. weigh: batches for the model, whose
    layers' inputs say what matters (`lora`, `sparse`; linear layers only, others are not weighed). probe: a batch to
    compare outputs on; by default a small one where the model's config says what it reads.

    Raises AddendaError, with the model as it was, for options that the form does not read, hidden methods, adapters of
    several models or twice the same, a change that is merged or zero, a taken name, and batches that do not run.
    """
    chosen = list(adapters) if isinstance(adapters, Iterable) else [adapters]
    if weigh is not None and not isinstance(weigh, Tensor):  # stacked batches are batches
        check_batches("weigh=", weigh)
    given = {
        "rank": rank, "energy": energy, "density": density, "count": count, "bits": bits,
        "weigh": None if weigh is None else list(weigh),
    }  # fmt: skip
    check_form(to, given)
    _check(chosen)
    return _reduced(chosen[0], chosen, to, given, name, probe)


@in_its_mode
def _reduced(
    adapter: Adapter, adapters: list[Adapter], to: To, given: dict[str, Any], name: str, probe: object | None
) -> ReduceReport:
    root, state, _ = record_of(adapter.model, adapter.name)
    ready(root, name)
    refuse_sharded(root, "nothing can be made of its adapters")
    batch = _probe(root, probe)
    for each in adapters:
        refuse_part(each, "what is made of it would be one too")
    places = _places(root, adapters)
    _refuse_packed(places, to)
    names = tuple(a.name for a in adapters)
    base, acting = (None if batch is None else outputs_of(root, which, batch).main for which in ((), names))
    forms: dict[str, tuple[Method, dict[str, Tensor]]] = {}
    rows: dict[str, ReducedSite] = {}
    copies, unchanged = {}, []
    with acting_again(root, state):
        apply_active(root, state, names)
        with training_mode(root, False):
            for site, live, second in _weighed(root, places, given["weigh"]):
                if not is_matrix(site, live):
                    copies[site.path] = {"value": (site.matrix.double() + total_delta(site, live)).float()}
                elif (made := _made(site, live, to, given, second)) is None:
                    unchanged.append(site.path)
                else:
                    forms[site.path], rows[site.path] = made
    if not forms:
        raise AddendaError(
            f"{_said(adapters)} changes no matrix of this {type(root).__name__}, so there is nothing to reduce"
            + (f" beside {some(list(copies))}." if copies else ": was it trained?")
        )
    labels = next((a.labels for a in adapters if a.labels), ())
    reduced = install(root, forms, name=name, heads=copies, labels=labels, what=f"The form {to!r} of {_said(adapters)}")
    try:
        for path, tensors in reduced.sites():
            if to == "patch" and path in forms:  # as the base is: nothing is lost, and a file is smaller
                tensors._parameters["values"].data = tensors._parameters["values"].to(site_at(root, path).weight.dtype)
        outputs = None
        if base is not None and acting is not None:
            outputs = _output_error(root, base, acting, outputs_of(root, (name,), batch).main)
    except BaseException:
        detach(root, name)
        raise
    order = [site.path for site, _ in places]
    bytes_of = _bytes(reduced), sum(map(_bytes, adapters))
    return ReduceReport(
        reduced, to, tuple(rows[p] for p in order if p in rows), bytes_of, outputs, tuple(copies), tuple(unchanged)
    )


def _made(site: Site, live: list[SiteTensors], to: To, given: dict[str, Any], second: Tensor | None):
    try:
        return form_of(site, live, to, given, second)
    except AddendaError as error:
        raise AddendaError(f"{site.path}: {error} Nothing was attached.") from None


# -- all sites ---------------------------------------------------------------------------------------------------------


def _places(root: nn.Module, adapters: list[Adapter]) -> list[tuple[Site, list[SiteTensors]]]:
    """Return each site of the adapters with the tensors that they have there, in the model's order."""
    owners, held = owners_of(root), {}
    for adapter in adapters:
        for path, tensors in adapter.sites():
            held.setdefault(path, []).append(tensors)
    order = {n: i for i, (n, _) in enumerate(root.named_modules())}
    paths = sorted(held, key=lambda p: order.get(p, order.get(p.rpartition(".")[0], len(order))))
    return [(site_at(root, path, owners), held[path]) for path in paths]


def _weighed(
    root: nn.Module, places: list[tuple[Site, list[SiteTensors]]], batches: list | None
) -> Iterator[tuple[Site, list[SiteTensors], Tensor | None]]:
    """Yield each site with its tensors and the second moment of its inputs, where batches are there and show any."""
    left = {site.path: (site, live) for site, live in places}
    linear = [site.path for site, live in places if site.kind.dense and is_matrix(site, live)]
    if batches and linear:
        for found in input_moments(root, batches, linear):
            for path, moments in found.items():
                yield *left.pop(path), moments.second
    for site, live in left.values():
        yield site, live, None


def _probe(root: nn.Module, probe: object | None) -> object | None:
    if probe is not None:
        return probe
    try:
        return probe_of(root)
    except AddendaError:  # nobody knows what it reads
        return None


def _output_error(root: nn.Module, base: Tensor, live: Tensor, made: Tensor) -> OutputError:
    kl, top1 = divergence(live, made) if hasattr(root, "config") and live.dim() > 1 else (None, None)
    gap = (made - live).double().abs().max()
    moved = (live - base).double()
    return OutputError(distance(made - base, live - base), float(gap), float(moved.abs().max()), kl, top1)


def _bytes(adapter: Adapter) -> int:
    held = [t for _, tensors in adapter.sites() for t in tensors.stored().values()]
    held += [t for _, pool in adapter.pools() for t in pool.stored().values()]
    return sum(part.numel() * part.element_size() for t in held for part in parts_of(t))


# -- what is given -----------------------------------------------------------------------------------------------------


def check_form(to: str, given: Mapping[str, Any]) -> None:
    """Raise AddendaError for an unknown form, options that it does not read, and those it wants and has not."""
    if to not in READS:
        raise AddendaError(f"There is no form {to!r}.{nearest(to, READS)} Known: {', '.join(READS)}.")
    if unread := [f"{k}=" for k, v in given.items() if v is not None and k not in READS[to]]:
        reads = ", ".join(f"{k}=" for k in READS[to] if k in given) or "no option of its own"
        raise AddendaError(f"{', '.join(unread)} is not read with to={to!r}, which reads {reads}.")
    if to == "lora" and given["rank"] is not None and given["energy"] is not None:
        raise AddendaError(f"Give rank= or energy=, not both; got {given['rank']} and {given['energy']}.")
    if to == "sparse" and (given["density"] is None) == (given["count"] is None):
        raise AddendaError("A sparse form wants density= or count=, one of them: how many entries of each matrix.")
    if given.get("weigh") is not None and not given["weigh"]:
        raise AddendaError("weigh= holds no batch. Give some that the model takes, or leave it out.")
    if wrong := problems(given):
        raise AddendaError(f"A reduction cannot be made so: {'; '.join(wrong)}.")


def _check(adapters: list[Adapter]) -> None:
    """Raise AddendaError for adapters that cannot be reduced together, before anything is looked at."""
    if not adapters or not all(isinstance(a, Adapter) for a in adapters):
        raise AddendaError(
            f"Expected an adapter of addenda, or several of one model, got {adapters or 'none'}. One of a name is "
            "adapters(model)[name]."
        )
    roots = {id(record_of(a.model, a.name).root) for a in adapters}
    if len(roots) > 1:
        raise AddendaError(f"{_said(adapters)} are adapters of {len(roots)} models. Load them on one.")
    if len({a.name for a in adapters}) < len(adapters):
        raise AddendaError(f"{_said(adapters)}: an adapter is named twice.")
    for a in adapters:
        refuse_hidden(a)
        host = record_of(a.model, a.name)
        intact(host.root, a.name, host.record)


def _refuse_packed(places: list[tuple[Site, list[SiteTensors]]], to: str) -> None:
    packed = [site.path for site, _ in places if isinstance(site.weight, Packed)]
    if to == "patch" and packed:
        raise AddendaError(
            f"{some(packed)}: the weight is kept in few bits, and a patch replaces plain numbers. Load the model "
            "unquantised, or use another form."
        )


def _said(adapters: list[Adapter]) -> str:
    return " + ".join(repr(a.name) for a in adapters)
