"""Attaching adapters to a model and detaching them, base bits untouched.

Everything is computed before the model is changed, so that a refused call leaves nothing behind.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from addenda.core.adapter.assign import Spec, allotted, assign, check_bits
from addenda.core.adapter.build import Assigned, BuildProgress, build_tensors
from addenda.core.adapter.calibration import calibrate
from addenda.core.adapter.grow import refuse_untold
from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import refuse_sharded
from addenda.core.forward.acting import alone, between_forwards
from addenda.core.forward.adapted import adapt, release
from addenda.core.forward.slots import slots_of
from addenda.core.forward.tensors import SiteTensors
from addenda.core.modules.borrow import in_its_mode
from addenda.core.modules.classes import refuse_derived
from addenda.core.modules.statistics import hold, let_go, mode_of
from addenda.core.modules.wrappers import model_in, unwrap
from addenda.core.site.positions import Positions, placed
from addenda.core.site.site import owners_of, site_at
from addenda.core.site.targets import Target, exactly, refuse_foreign
from addenda.core.state import bypass, save_pretrained
from addenda.core.state.cache_length import follow
from addenda.core.state.merged import apart, restore, still_merged
from addenda.core.state.state import (
    Record,
    State,
    apply_active,
    check_name,
    find_state,
    record_of,
    state_of,
)
from addenda.core.state.undo import undone
from addenda.core.state.vocabulary import grown_of, keep_rows, take_off


@in_its_mode
@checked()
def attach(
    model: nn.Module,
    method: Spec | Mapping[Target, Spec],
    *,
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    also_train: Iterable[Target] = (),
    head_bits: int | None = None,
    freeze: bool = True,
    name: str = "default",
    seed: int = 0,
    calibration: Iterable | None = None,
    positions: Mapping[str, Positions] | None = None,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
    progress: BuildProgress | None = None,
) -> Adapter:
    """Put a new adapter on the model, make it the active one, and freeze the base.

    method: a method, its text form ("name:option=value"), an entry of `catalogue()`, or {target: method}. targets,
    exclude: see `core.site.targets`; by default what the method names, for most of them "linear". also_train: modules
    trained as whole copies with the adapter (heads); head_bits: in so many bits, as the option `bits` of a method
    does for its own matrices. freeze: no parameter of the base learns, and nothing that it gathers about its inputs
    in training mode moves: batch norms work with the statistics that they have (`core.modules.statistics`), those too
    whose weights are trained. With freeze=False all of that goes on, and no adapter's file holds it, so that `save`
    wants to be told (without_base=True). seed: with a site's path, the key of every random tensor. calibration: batches
    for methods that look at data first; loss(model, batch) defaults to `model(**batch).loss`. positions: for methods
    that take them as given (`sparse`), of each site the flat positions in its matrix, or vector, that are trained; they
    say the targets too, where none are named. progress: called with (done, total, path).

    Raises AddendaError, and leaves the model as it was, when a target matches nothing, a site cannot take the method,
    the name is taken, a merged change is in the base, data is missing for a calibrated method, positions are none of
    their site, or the model is sharded.
    """
    started = time.perf_counter()
    root, state = ready(model, name)
    refuse_untold(root)
    if positions is not None and targets is None and not isinstance(method, Mapping):
        targets = exactly(root, positions)
    plan, heads = assign(root, method, targets, exclude, also_train, head_bits)
    plan, given = placed(plan, positions)
    calibrated = calibrate(root, plan, calibration, loss)
    plan = allotted(plan, calibrated)
    built = build_tensors(plan, seed, progress, seen=calibrated | given)
    check_bits((m, any(built[site.path].matrices)) for site, m in plan)
    return install(root, state, name, plan, built, heads, seed, freeze, started)


def ready(model: nn.Module, name: str) -> tuple[nn.Module, State]:
    """Return the module that carries the state, and the state. Raises AddendaError where it cannot be attached to."""
    model_in(model)
    wrapped = type(model).__name__ in (
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "OptimizedModule",
    )
    if wrapped or hasattr(model, "set_modules_to_forward_prefetch"):
        raise AddendaError(
            f"The model is wrapped in {type(model).__name__}. Attach first, then wrap, shard or compile."
        )
    refuse_foreign(model)
    host = find_state(model)
    root, state = host if host else (unwrap(model), State())
    if host and root is not unwrap(model):
        raise AddendaError(
            f"A part of this {type(unwrap(model)).__name__}, a {type(root).__name__}, carries adapters already. "
            "Attach to that part again, or detach there first."
        )
    if not host and any(slots_of(m) is not None for m in root.modules()):
        raise AddendaError(
            f"This {type(root).__name__} is part of a model that carries adapters. Attach to that model."
        )
    check_name(state, name)
    if state.merged is not None:
        raise AddendaError("A change is merged into the base. Call unmerge(model) first.")
    with alone(root, "attach and load"):  # asked before anything is looked at, and again before it is changed
        pass
    return root, state


@between_forwards("attach and load")
def install(
    root: nn.Module,
    state: State,
    name: str,
    plan: Assigned,
    built: dict[str, SiteTensors],
    heads: tuple[str, ...],
    seed: int,
    freeze: bool,
    started: float,
    activate: bool = True,
) -> Adapter:
    """Register the tensors on the modules. Nothing here fails for a reason that a user could mend; Ctrl-C undoes it."""
    with undone(root):
        return _installed(root, state, name, plan, built, heads, seed, freeze, started, activate)


def _installed(root, state, name, plan, built, heads, seed, freeze, started, activate) -> Adapter:
    root.__dict__["_addenda"] = state
    if freeze and not state.frozen:
        adapter_ids = {id(p) for m in root.modules() if (s := slots_of(m)) is not None for p in s.parameters()}
        state.frozen = {n: p.requires_grad for n, p in root.named_parameters() if id(p) not in adapter_ids}
        for n, p in root.named_parameters():
            if n in state.frozen:
                p.requires_grad_(False)
    if state.frozen:
        hold(root)
    for site, _ in plan:
        tensors = built[site.path]
        tensors.train(mode_of(site.module))
        adapt(site).add(name, site, tensors)
    origins = {s.path: s.key for s, _ in plan if s.key != s.path}
    seconds, grown = time.perf_counter() - started, grown_of(root) is not None
    methods = {s.path: m for s, m in plan}
    state.records[name] = Record(methods, heads, seed, seconds=seconds, origins=origins, grown=grown)
    apply_active(root, state, (name,) if activate else state.active, stay=not activate)
    follow(root)
    bypass.hook(root, state)
    save_pretrained.guard(root, state)
    adapter = Adapter(root, name)
    adapter.draw()
    adapter.begin()
    return adapter


@checked()
@in_its_mode
def detach(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> None:
    """Take one adapter, or all of them, off the model: same classes, keys, flags and bits as before.

    A change that is merged is taken out of the base first, unless those that go have no part in it; with
    keep_merged=True it stays, and all adapters go.
    Raises AddendaError for an unknown name, when nothing is attached, when the model is sharded, and where a module has
    got another class since, as a parametrization gives it.
    """
    host = state_of(model) if name is None else record_of(model, name)
    root, state = host.root, host.state
    refuse_sharded(root, "no adapter can be taken off it")
    if keep_merged and (state.merged is None or name is not None):
        raise AddendaError("keep_merged=True wants a merged change and no name. Call merge(model) first.")
    for path, module in root.named_modules():
        refuse_derived(module, path)
    names = list(state.records) if name is None else [name]
    with alone(root, "detach"):
        apart(state, names)
        _detach(root, state, names, keep_merged)


def _detach(root: nn.Module, state: State, names: list[str], keep_merged: bool) -> None:
    taking_part = not state.active or set(names) & set(state.active)
    with still_merged(state):
        if state.merged is not None and not keep_merged and (taking_part or grown_of(root) is not None):
            restore(root, state)
        with undone(root):  # what stands in the tensors of the base is right by now
            if keep_merged:
                keep_rows(root)
            _take_off(root, state, names)


def _take_off(root: nn.Module, state: State, names: list[str]) -> None:
    """Take adapters that are not merged off the model."""
    for module in list(root.modules()):
        slots = slots_of(module)
        if slots is not None:
            for n in names:
                slots.remove(n)
    for n in names:
        del state.records[n]
    adapted = _still_adapted(root, state)
    for module in list(root.modules()):
        if slots_of(module) is not None and id(module) not in adapted:
            release(module)
    follow(root)
    bypass.hook(root, state)
    save_pretrained.guard(root, state)
    if state.records:
        apply_active(root, state, tuple(n for n in state.active if n in state.records), stay=True)
        _let_rows_go(root, state)
        return
    parameters = dict(root.named_parameters())
    for n, flag in state.frozen.items():
        if n in parameters:
            parameters[n].requires_grad_(flag)
    let_go(root.modules())
    del root.__dict__["_addenda"]
    _let_rows_go(root, state)


def _let_rows_go(root: nn.Module, state: State) -> None:
    """Take off the rows that came with a file, where no adapter has them any more."""
    grown = grown_of(root)
    if grown is not None and grown.loaded and not any(r.grown for r in state.records.values()):
        take_off(root)


def _still_adapted(root: nn.Module, state: State) -> set[int]:
    ids, owners = set(), owners_of(root)
    for record in state.records.values():
        for path in record.methods:
            try:
                site = site_at(root, path, owners)
            except AddendaError:  # replaced since
                continue
            ids |= {id(module) for module in site.modules}
    return ids
