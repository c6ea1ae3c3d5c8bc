"""Attach, detach and switch: putting adapters on a model and taking them off, base bits untouched.

Everything is computed before the model is changed, so that a refused call leaves nothing behind.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from addenda.core.adapter.build import Assigned, Progress, build_tensors
from addenda.core.adapter.calibration import calibrate
from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import refuse_sharded
from addenda.core.forward.acting import Block, alone, between_forwards, blocks, inside, lock
from addenda.core.forward.adapted import SiteTensors, adapt, release, slots_of
from addenda.core.forward.per_example import Mixed, PerExample
from addenda.core.method.catalogue import Info, build
from addenda.core.method.contract import Method, Replace, WeightMethod
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.borrow import in_its_mode
from addenda.core.modules.late_backward import checkpointed, checkpoints, tell, used
from addenda.core.modules.statistics import hold, let_go, mode_of
from addenda.core.site.site import EMBEDDING, PARAMETER, Point, Site, owners_of, refusal, site_at, with_neighbours
from addenda.core.site.structure import points
from addenda.core.site.targets import Target, all_paths, matching, refuse_foreign, resolve
from addenda.core.state import bypass
from addenda.core.state import copies as cast
from addenda.core.state.cache_length import follow
from addenda.core.state.state import (
    Arrangement,
    Record,
    State,
    apply_active,
    apply_block,
    check_name,
    find_state,
    intact,
    mirror,
    record_of,
    state_of,
    sweep,
    unwrap,
)
from addenda.core.state.undo import undone

Spec = Method | str | Info


def assign(
    model: nn.Module,
    method: Spec | Mapping[Target, Spec],
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    also_train: Iterable[Target] = (),
    head_bits: int | None = None,
) -> tuple[Assigned, tuple[str, ...]]:
    """Which method goes to which site, in the model's order, and the paths of `also_train` among them.

    Raises AddendaError listing every site that its method cannot take, with the reasons.
    """
    refuse_foreign(model)
    also_train = [also_train] if isinstance(also_train, str) else list(also_train)
    heads, copy = [site for target in also_train for site in _parameters_of(model, target)], Replace(bits=head_bits)
    if head_bits is not None and not heads:
        raise AddendaError(f"head_bits={head_bits} is for the heads that also_train names, and it names none.")
    owned = {id(site.weight) for site in heads}
    plan: dict[str, tuple[Site, Method]] = {}
    taken: set[int] = set()
    if isinstance(method, Mapping) and targets is not None:
        raise AddendaError("With {target: method} every method names its own targets; leave targets= out.")
    groups = method.items() if isinstance(method, Mapping) else [(targets, method)]
    for target, spec in groups:
        chosen = build(spec) if isinstance(spec, str) else spec.build() if isinstance(spec, Info) else spec
        if not isinstance(chosen, Method):
            raise AddendaError(f"Expected a method such as addenda.catalogue() lists, or its name, got {chosen!r}.")
        named = chosen.targets if target is None else target
        for found in _sites_of(model, chosen, named, exclude):
            site = with_neighbours(model, found, chosen.beside(found.path))
            if site.changed in taken:
                raise AddendaError(f"{site.path} is named by two targets; exclude it from one of them.")
            taken.add(site.changed)
            if site.changed not in owned:
                plan[site.path] = (site, chosen)
    if not plan:
        raise AddendaError("also_train takes every site that the targets name, so nothing is left for the method.")
    problems = [f"{site.path}: {why}" for site, m in plan.values() if (why := unfit(site, m))]
    problems += [f"{site.path}: {why}" for site in heads if (why := refusal(model, site) or unfit(site, copy))]
    if problems:
        more = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AddendaError(
            f"{len(problems)} of {len(plan) + len(heads)} sites cannot take the method: "
            f"{'; '.join(problems[:8])}{more}. "
            "Leave them out with exclude=, or give them another method with {target: method}."
        )
    for site in heads:
        plan[site.path] = (site, copy)
    order = {path: i for i, path in enumerate(all_paths(model))}
    plan = dict(sorted(plan.items(), key=lambda item: order.get(item[1][0].weight_path, len(order))))
    return list(plan.values()), tuple(dict.fromkeys(site.path for site in heads))


def _sites_of(model: nn.Module, method: Method, targets, exclude: Iterable[Target]) -> list[Site]:
    if isinstance(method, HiddenMethod):
        return list(points(model, method, targets, exclude))
    return resolve(model, targets, exclude)


def _parameters_of(model: nn.Module, target: Target) -> list[Site]:
    """`also_train`: every parameter of the modules (of any class) that a target names."""
    named = dict(model.named_modules())
    paths = [p for p in named if p and isinstance(target, str) and (p == target or p.endswith(f".{target}"))]
    if not paths:
        paths = matching(model, target) or [s.path for s in resolve(model, target)]  # raises if nothing is there
    found = []
    for path in paths:
        inside = [f"{path}.{n}" for n, _ in named[path].named_parameters()] if path in named else [path]
        found += [site_at(model, p) for p in inside if ".addenda." not in f".{p}."]
    return found


def unfit(site: Site, method: Method) -> str | None:
    """Why this site cannot take this method, or None."""
    slots = slots_of(site.module)
    if slots is not None and slots.kinds.get(site.parameter, site.kind) != site.kind:
        held = slots.kinds[site.parameter].name
        return f"another adapter holds this weight as a {held}, not as a {site.kind.name}; detach it first"
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
    return method.check(*site.shape)


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
    loss: Callable[[nn.Module, object], Tensor] | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Put a new adapter on the model, make it the active one, and freeze the base.

    method: a method, its text form ("name:option=value"), an entry of `catalogue()`, or {target: method}. targets,
    exclude: see `core.site.targets`; by default what the method names, for most of them "linear". also_train: modules
    trained as whole copies with the adapter (heads); head_bits: in so many bits, as the option `bits` of a method
    does for its own matrices. freeze: no parameter of the base learns, and nothing that it gathers about its inputs
    in training mode moves: batch norms work with the statistics that they have (`core.modules.statistics`), those too
    whose weights are trained. With freeze=False all of that goes on, and no adapter's file holds it. seed: with a
    site's path, the key of every random tensor. calibration: batches for methods that look at data first; loss(model,
    batch) defaults to `model(**batch).loss`. progress: called with (done, total, path).

    Raises AddendaError, and leaves the model as it was, when a target matches nothing, a site cannot take the method,
    the name is taken, a merged change is in the base, data is missing for a calibrated method, or the model is sharded.
    """
    started = time.perf_counter()
    root, state = ready(model, name)
    plan, heads = assign(root, method, targets, exclude, also_train, head_bits)
    seen = calibrate(root, plan, calibration, loss)
    plan = allotted(plan, seen)
    built = build_tensors(plan, seed, progress, seen=seen)
    check_bits((m, any(built[site.path].matrices)) for site, m in plan)
    return install(root, state, name, plan, built, heads, seed, freeze, started)


def check_bits(found: Iterable[tuple[Method, bool]]) -> None:
    """found: the method of every site, and whether it trains a matrix there. Raises where bits have none to act on."""
    some: dict[Method, bool] = {}
    for m, has in found:
        some[m] = some.get(m, False) or has
    for m in (m for m, has in some.items() if m.bits is not None and not has):
        raise AddendaError(f"bits={m.bits} is for trained matrices, and {m.name or 'the head'} trains vectors only.")


def allotted(plan: Assigned, seen: dict[str, Tensor]) -> Assigned:
    """The plan after methods have handed out among their sites what calibration suggests."""
    given: dict[str, Method | None] = {}
    for m in dict.fromkeys(m for _, m in plan if m.has("allot") and m.calibration is not None):
        own = [site for site, other in plan if other == m]
        methods = m.allot([site.shape for site in own], [seen[site.path] for site in own])
        given.update(zip((site.path for site in own), methods, strict=True))
    now = [(site, given.get(site.path, m)) for site, m in plan]
    problems = [f"{site.path}: {why}" for site, m in now if m is not None and (why := m.check(*site.shape))]
    if problems:
        raise AddendaError(f"What calibration suggests does not fit {len(problems)} sites: {'; '.join(problems[:8])}.")
    return [(site, m) for site, m in now if m is not None]


def ready(model: nn.Module, name: str) -> tuple[nn.Module, State]:
    """The module that carries the state and the state; raises when nothing can be attached now."""
    if not isinstance(model, nn.Module):
        raise AddendaError(f"Expected a torch.nn.Module as the model, got {type(model).__name__}.")
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
    found = find_state(model)
    root, state = found if found else (unwrap(model), State())
    if found and root is not unwrap(model):
        raise AddendaError(
            f"A part of this {type(unwrap(model)).__name__}, a {type(root).__name__}, carries adapters already. "
            "Attach to that part again, or detach there first."
        )
    if not found and any(slots_of(m) is not None for m in root.modules()):
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
    """Register the tensors on the modules. Nothing here fails for reasons that a user could mend; Ctrl-C undoes it."""
    with undone(root):
        return _installed(root, state, name, plan, built, heads, seed, freeze, started, activate)


def _installed(root, state, name, plan, built, heads, seed, freeze, started, activate) -> Adapter:
    root.__dict__["_addenda"] = state
    if freeze and not state.frozen:
        own = {id(p) for m in root.modules() if (s := slots_of(m)) is not None for p in s.parameters()}
        state.frozen = {n: p.requires_grad for n, p in root.named_parameters() if id(p) not in own}
        for n, p in root.named_parameters():
            if n in state.frozen:
                p.requires_grad_(False)
    if state.frozen:
        hold(root)
    for site, _ in plan:
        tensors = built[site.path]
        tensors.train(mode_of(site.module))
        adapt(site).add(name, site, tensors)
    state.records[name] = Record({s.path: m for s, m in plan}, heads, seed, seconds=time.perf_counter() - started)
    apply_active(root, state, (name,) if activate else state.active)
    follow(root)
    bypass.hook(root, state)
    adapter = Adapter(root, name)
    adapter.draw()
    return adapter


@in_its_mode
def detach(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> None:
    """Take one adapter, or all of them, off the model: same classes, keys, flags and bits as before.

    A merged change is taken out of the base first; with keep_merged=True it stays, and all adapters go.
    Raises AddendaError for an unknown name, when nothing is attached, or when the model is sharded.
    """
    root, state = state_of(model) if name is None else record_of(model, name)[:2]
    refuse_sharded(root, "no adapter can be taken off it")
    if keep_merged and (state.merged is None or name is not None):
        raise AddendaError("keep_merged=True wants a merged change and no name. Call merge(model) first.")
    names = list(state.records) if name is None else [name]
    with alone(root, "detach"):
        apart(state, names)
        _detach(root, state, names, keep_merged)


def apart(state: State, names: Iterable[str] | None = None) -> None:
    """Raises AddendaError where one of these adapters, or any for None, acts in a block of another thread or task."""
    for block in list(state.blocks):
        acting = set(block.names) if names is None else set(block.names) & set(names)
        if not block.closed and block not in blocks() and (acting or names is None):
            of = ", ".join(map(repr, sorted(acting))) or "the base alone"
            raise AddendaError(f"Another thread or task is in a `with` block of {of}. Wait for its end.")


def _detach(root: nn.Module, state: State, names: list[str], keep_merged: bool) -> None:
    if state.merged is not None and not keep_merged:
        restore(root, state)
    with undone(root):  # what stands in the tensors of the base is right by now
        _take_off(root, state, names)


def _take_off(root: nn.Module, state: State, names: list[str]) -> None:
    """Adapters that are not merged, off the model."""
    for module in list(root.modules()):
        slots = slots_of(module)
        if slots is not None:
            for n in names:
                slots.remove(n)
    for n in names:
        del state.records[n]
    held = _still_adapted(root, state)
    for module in list(root.modules()):
        if slots_of(module) is not None and id(module) not in held:
            release(module)
    follow(root)
    bypass.hook(root, state)
    if state.records:
        apply_active(root, state, tuple(n for n in state.active if n in state.records), stay=True)
        return
    parameters = dict(root.named_parameters())
    for n, flag in state.frozen.items():
        if n in parameters:
            parameters[n].requires_grad_(flag)
    let_go(root.modules())
    del root.__dict__["_addenda"]


def _still_adapted(root: nn.Module, state: State) -> set[int]:
    held, owners = set(), owners_of(root)
    for record in state.records.values():
        for path in record.methods:
            try:
                site = site_at(root, path, owners)
            except AddendaError:  # replaced since
                continue
            held |= {id(module) for module in site.modules}
    return held


@torch.no_grad()
def restore(root: nn.Module, state: State) -> None:
    """Write the base's own bits back after a merge, and all that it has converted to another dtype."""
    take_out(root, state)
    cast.put_back(root, state.cast)
    state.cast = {}


def take_out(root: nn.Module, state: State) -> None:
    """Write the bits back that the base had when the change was written into it."""
    owners = owners_of(root)
    for path, kept in (state.merged or {}).items():
        try:
            site = site_at(root, path, owners)
        except AddendaError:
            continue
        replaced = kept.adapted and slots_of(site.module) is None  # by a module that has other bits
        if not replaced and kept.fits(site.weight):
            kept.into(site)
    state.merged = None
    state.fingerprints.clear()  # those of the copies that end here


@in_its_mode
def switch(model: nn.Module, name: str | Iterable[str] | None) -> None:
    """Make one adapter, several, or none of them act. Base bits are never touched.

    Of several, changes of weights add up, and changes of activations act one after another, in this order. This is the
    model's state: all threads see it, but for those in a block of `per_example`, `composed` or `disabled`. In a block
    of the caller's own it acts at once, and stays behind its end.

    Raises AddendaError for an unknown name, a merged change, and while another thread runs a forward of the model.
    """
    root, state = state_of(model)
    names = () if name is None else (name,) if isinstance(name, str) else tuple(name)
    for n in names:
        intact(root, n, record_of(root, n)[2])
    if len(set(names)) < len(names):
        raise AddendaError(f"An adapter acts once; got {names}.")
    if state.merged is not None:
        raise AddendaError(f"{', '.join(state.active)} is merged into the base. Call unmerge(model) first.")
    apply_active(root, state, names)


def disabled(model: nn.Module) -> AbstractContextManager:
    """The base alone, for the length of a `with` block; afterwards what acted before acts again.

    For the calling thread or task alone, as `per_example`: see there. Raises AddendaError for a merged change.
    """

    def mix(held: list[SiteTensors | None]) -> Mixed:
        raise AssertionError("no adapter is named")

    return arranged(model, (), mix, ())


@contextmanager
def arranged(
    model: nn.Module,
    names: Sequence[str],
    mix: Callable[[list[SiteTensors | None]], Mixed],
    in_turn: Sequence[str] | None = None,
) -> Iterator[Callable[[], bool]]:
    """For the length of a `with` block, at every site acts what `mix` makes of the named adapters' tensors there.

    mix is given one entry for each name, None where that adapter has nothing; it is not asked where none has. in_turn:
    the adapters that act at raw parameters, which see no batch; None where that makes no sense. Afterwards what acted
    before acts again, another arrangement too. Gives a function that tells whether this acts now, and no block inside.
    It acts for the calling context alone (`core.forward.acting`). What backward computes again uses it, behind the end
    too.

    Raises AddendaError for an unknown name, a merged change, and adapters of raw parameters without in_turn.
    """
    root, state = state_of(model)
    for n in names:
        intact(root, n, record_of(root, n)[2])
    if state.merged is not None:
        raise AddendaError(f"{', '.join(state.active)} is merged into the base. Call unmerge(model) first.")
    owners = owners_of(root)
    for path in dict.fromkeys(p for n in names for p in state.records[n].methods) if in_turn is None else ():
        site = site_at(root, path, owners)
        if site.kind == PARAMETER or site.ties:
            what = "is a raw parameter" if site.kind == PARAMETER else "is shared by several modules"
            raise AddendaError(f"{path} {what}, and sees no batch to choose an adapter for each example of.")
    own = Arrangement(names=tuple(names), mix=mix, in_turn=tuple(in_turn or ()))
    again = checkpointed(root)

    def acts() -> bool:
        if torch.compiler.is_compiling():
            return state.here.block is own
        return used(own, lambda: state.arrangement is own)

    def mark(module: nn.Module, args: tuple, out: object) -> None:
        if checkpoints(again) and state.arrangement is own:
            tell(out, Block, own)

    with lock:
        apply_block(root, state, own)
    finalize(own, sweep, ref(root)).atexit = False
    flagged = any(m.gradient_checkpointing is True for m in again)
    handle = root.register_forward_hook(mark) if flagged else None
    try:
        with inside(own):
            mirror(root, state)
            yield acts
    finally:
        if handle is not None:
            handle.remove()
        mirror(root, state)


def per_example(model: nn.Module, names: Sequence[str | None]) -> AbstractContextManager:
    """For the length of a `with` block, example i of every batch passes through the adapter names[i]; None: the base.

    The first dimension of every adapted layer's input must be the batch. Low-rank adapters share one base product;
    for others the batch is split by adapter. Gradients reach the adapters that are named. Afterwards what acted before
    acts again. The block is the calling thread's or asyncio task's own: another thread, one that was started in here
    too, sees the model's state, unless it runs in `contextvars.copy_context()`.

    Raises AddendaError for an unknown name, a merged change, and adapters of raw parameters, which see no batch.
    """
    used = tuple(dict.fromkeys(n for n in names if n is not None))
    which = torch.tensor([-1 if n is None else used.index(n) for n in names])

    def mix(held: list[SiteTensors | None]) -> Mixed:
        here = [t for t in held if t is not None]
        place = torch.tensor([-1 if t is None else here.index(t) for t in [None, *held]])  # -1: the base
        return PerExample(tuple(here), place[which + 1])

    return arranged(model, used, mix)


def status(model: nn.Module) -> str:
    """What is attached to the model and what acts, one line each."""
    found = find_state(model)
    if found is None:
        return f"{type(unwrap(model)).__name__}: no adapter attached"
    root, state = found
    lines = [
        f"{type(root).__name__}: {len(state.records)} adapter(s), base {'merged' if state.merged else 'untouched'}"
    ]
    for name, record in state.records.items():
        adapter = Adapter(root, name)
        try:
            intact(root, name, record)
        except AddendaError as error:
            lines.append(f"  {name}: damaged: {error}")
            continue
        mark = "active" if name in state.active else "idle"
        trains = any(p.requires_grad for p in adapter.parameters())
        lines.append(
            f"  {name}: {mark}, {adapter.kinds}, {len(record.methods)} sites, "
            f"{adapter.trainable:,} trainable parameters{'' if trains else ' (not training)'}, step {record.step}"
        )
    return "\n".join(lines)
