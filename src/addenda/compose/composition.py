"""Several adapters in one forward, composed: stacked, averaged, side by side, or weighed by attention.

    with ad.composed(model, ad.Stack("language", ad.Average("a", "b", weights=(2, 1)))):
        model(**batch)

At every site each part is the change that one adapter, or another composition, makes there:

| composition | what a site returns |
| --- | --- |
| `Stack("a", "b")` | b(a(v)): the second changes what the first made; for weights ΔW_a + ΔW_b |
| `Stack("a", "b", skip="own")` | the second reads what the first made, but adds to the module's own: `compose.stack` |
| `Average("a", "b", weights=(2, 1))` | Σ w_i a_i(v), the weights scaled to a sum of 1 |
| `Split("a", "b", sizes=(3, None))` | a for the first 3 tokens, b for the rest; by row, by pair: `compose.split` |
| `BatchSplit("a", "b", sizes=(2, 6))` | a for the first 2 examples, b for the other 6 |
| `Parallel("a", "b")` | the batch twice at the model's input, its first copy through a, the second through b |
| `Fuse("a", "b", by="f")` | v + attention over a(v) − v and b(v) − v, by the trained adapter f |

A part is a name, None for the base alone, or a composition; `Parallel` stands outside. An adapter that has nothing at
a site leaves it as it is there, and acts once on whatever passes through it: `Stack("a", Split("a", "b"))` is refused.
Layers see the batch as the first dimension and tokens as the second. Where both an adapter's reading and what it
changes are the same activation, "b(a(v))" means that b reads what a made; a parallel one reads its own input in any
case. Gradients reach every adapter that takes part. With gradient checkpointing backward may run inside the block or
behind it: what it computes again does as in its forward (`core.modules.late_backward`).

Blocks nest: inside another one, or inside `addenda.disabled`, that one acts alone, and afterwards the outer one again.
A block is the calling thread's or asyncio task's own, see `addenda.per_example`.

Raw parameters (biases, norms, heads trained with an adapter) see no tokens of their own. Where a composition comes down
to a list of adapters there, it is that list; else the module around them runs once for each part, on that part's
tokens or rows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from addenda.compose.layers import Layers, left_out
from addenda.compose.residual import residuals_of
from addenda.compose.seen import Seen, told
from addenda.compose.split import BatchSplit, Parallel, Split
from addenda.compose.stack import Composition, Fuse, Held, Stack, names_in, plain_in
from addenda.compose.ways import Hidden, Weights, Whole
from addenda.core.adapter.blocks import arranged
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.forward.acting import lock
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.classes import original_class
from addenda.core.site.kinds import EMBEDDING, PARAMETER, Kind, kind_of
from addenda.core.site.site import Site, is_norm, owners_of, site_at
from addenda.core.state.state import intact, record_of, state_of, tensors_at


@dataclass(frozen=True, eq=False)
class _Bound(Mixed):
    """A composition at one parameter. held: each adapter's tensors there by name."""

    composition: Composition
    bound: Composition
    held: Held
    seen: Seen

    def layer(self, module: nn.Module, original: type, kind: Kind, x: Tensor, *rest, **options) -> Tensor:
        return self.bound.act(Weights(module, original, kind, rest, options, self.seen), x, lambda t: t)

    def act(self, one: Callable, v: Tensor, back: bool = False) -> Tensor:
        return self.bound.act(Hidden(one, back, self.seen), v, lambda t: t)

    def whole(self, run: Callable, module: nn.Module, mixed: dict, args: tuple, kwargs: dict) -> Any:
        options = dict(kwargs)
        x, *rest = args or [options.pop(next(iter(options)))]
        held = {p: m.held for p, m in mixed.items()}
        way = Whole(run, held, kind_of(module) == EMBEDDING, tuple(rest), options, len(x), self.seen)
        return self.composition.act(way, x, lambda t: t)


@checked()
@contextmanager
def composed(model: nn.Module, composition: Composition, *, leave_out: Layers = ()) -> Iterator[None]:
    """Let a composition of adapters act for the length of a `with` block; afterwards what acted before acts again.

    leave_out: layers (transformer blocks) in which its adapters do not act (AdapterDrop): numbers, 0 the first and −1
    the last, or "first:3", "last:3"; or such by name of an adapter. Heads and embeddings are in no layer. By default
    what `composition.without(layers)` said.

    Raises AddendaError for an unknown adapter, a merged change, layers that are not there, a fusion that is none or
    shares no place with one of its parts, a Stack with skip="own" of changes that cannot have it, and raw parameters
    that no part of the input can be told for, such as two heads in a Split.
    """
    if not isinstance(composition, Composition):
        raise AddendaError(f"Expected a composition such as Stack('a', 'b'), got {composition!r}.")
    root, _ = state_of(model)
    names = composition.names()
    for n in names:
        intact(root, n, record_of(root, n).record)
    _check_fusions(root, composition)
    omitted = left_out(root, names, leave_out or composition.leave_out)
    _check_raw(root, composition)
    _check_rows(root, composition)
    sources = residuals_of(root, composition)
    seen = Seen()

    def mix(held: list[SiteTensors | None]) -> Mixed | tuple[SiteTensors, ...]:
        tensors = {n: None if id(t) in omitted else t for n, t in zip(names, held, strict=True)}
        plain = composition.plain(tensors)
        if plain is not None:
            return plain
        present = tuple(t for t in tensors.values() if t is not None)
        return _Bound(present, composition, composition.bound(tensors), tensors, seen)

    splits = [c for c in composition.within() if isinstance(c, Split) and c.asks]
    with arranged(model, names, mix, raw=True) as acts, ExitStack() as stack:
        if isinstance(composition, Parallel):
            stack.enter_context(_repeated(root, composition, acts))
        if splits or sources:
            stack.enter_context(told(root, seen, splits, sources, acts))
        yield


@contextmanager
def _repeated(root: nn.Module, parallel: Parallel, acts: Callable[[], bool]) -> Iterator[None]:
    """Repeat the model's batch in every forward while acts(), and make its `generate` refuse meanwhile."""

    def repeat(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        inside = module is root and acts()  # a copy that is made in the block is in none
        return parallel.repeat(module, args, kwargs) if inside else None

    with lock:
        guards = root.__dict__.setdefault("_addenda_parallel", [])
        guards.append((parallel, acts))
        if len(guards) == 1 and hasattr(root, "generate"):
            root.__dict__["generate"] = _Refuse(guards, root.__dict__.get("generate"), root)
    hook = root.register_forward_pre_hook(repeat, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        with lock:
            guards.remove((parallel, acts))
            if not guards:
                del root.__dict__["_addenda_parallel"]
                refusing = root.__dict__.pop("generate", None)
                if isinstance(refusing, _Refuse) and refusing.own is not None:
                    root.__dict__["generate"] = refusing.own


@dataclass(frozen=True, eq=False)
class _Refuse:
    """A stand-in for a model's `generate`, which raises AddendaError while somebody is in a block of Parallel."""

    guards: list[tuple[Parallel, Callable[[], bool]]]
    own: Any  # one that stood on the model itself
    root: nn.Module

    def __call__(self, *args, **kwargs) -> Any:
        for parallel, acts in list(self.guards):
            if acts():
                n = len(parallel.parts)
                raise AddendaError(
                    f"Parallel of {n} repeats the batch in every forward, so generate would get {n} rows for each that "
                    f"it has. Repeat its inputs {n} times, ids and mask, and compose BatchSplit(…, sizes=[examples] * "
                    f"{n}) instead."
                )
        cls: Any = type(self.root)
        generate = self.own or cls.generate.__get__(self.root)
        return generate(*args, **kwargs)


# -- what cannot be composed -------------------------------------------------------------------------------------------


def _check_fusions(root: nn.Module, composition: Composition) -> None:
    """Raise AddendaError where a fusion is none, or could never see what one of its parts changes."""
    for fuse in composition.within():
        if not isinstance(fuse, Fuse):
            continue
        by, methods = fuse.by, record_of(root, fuse.by).record.methods
        if not any(isinstance(m, HiddenMethod) and m.has("fuse") for m in methods.values()):
            raise AddendaError(f"Fuse(by={by!r}) wants an adapter of a method that weighs others, such as fusion.")
        for part in fuse.parts:
            changed = {p: None for n in names_in(part) for p in record_of(root, n).record.methods if "@" in p}
            if changed and not set(map(_place, changed)) & set(map(_place, methods)):
                raise AddendaError(
                    f"Fuse(by={by!r}) weighs changes at {len(methods)} places, e.g. {next(iter(methods))}, and "
                    f"{part!r} changes {len(changed)} others, e.g. {next(iter(changed))}: none is shared, so it would "
                    "be left out. Attach the fusion where its adapters are, with its option reads= and targets=."
                )


def _place(path: str) -> tuple[str, bool]:
    """Return the place of a change: its module, and whether that runs again. Changes at one place can be weighed."""
    module, _, reads = path.partition("@")
    return module, reads == "again"


def _check_raw(root: nn.Module, composition: Composition) -> None:
    """Raise AddendaError where raw parameters or shared weights would differ by part, and the module cannot be cut."""
    names, owners = composition.names(), owners_of(root)
    records = {n: record_of(root, n).record for n in names}
    for path in dict.fromkeys(p for r in records.values() for p in r.methods if "@" not in p):
        site = site_at(root, path, owners)
        if site.kind != PARAMETER and not site.ties:
            continue
        held = {n: tensors_at(root, n, path) if path in r.methods else None for n, r in records.items()}
        if composition.plain(held) is None:
            head = any(path in r.also_train for r in records.values())
            _check_raw_at(site, [c for c in composition.within() if c.plain(held) is None], held, head)


def _check_raw_at(site: Site, mixing: list[Composition], held: Held, head: bool) -> None:
    kinds = ", ".join(dict.fromkeys(type(c).__name__ for c in mixing))
    if site.ties:
        raise AddendaError(f"{site.path} is shared by several modules, and sees no batch that {kinds} could cut.")
    by_token = any(isinstance(c, Split) for c in mixing)
    if head and by_token:
        raise AddendaError(
            f"{site.path} is a head, which sees no tokens, and several parts of a Split have one of their own. Say "
            "with pooled= whose acts, or put the adapter with the head behind it: Stack(Split('a', 'b'), 'task')."
        )
    lacking = [c for c in mixing if not isinstance(c, Split) and any(plain_in(p, held) == () for p in c.parts)]
    if head and any(not c.spreads and not isinstance(c, Stack) for c in lacking):
        raise AddendaError(
            f"{site.path} is a head that only some parts of {kinds} have: its mean with the base's own would be no "
            "head. Put the adapter with it behind the others: Stack(Average('a', 'b'), 'task')."
        )
    simple = kind_of(site.module) is not None or is_norm(site.module)
    if not simple and not all(isinstance(c, (BatchSplit, Parallel)) for c in mixing):
        kind = original_class(site.module).__name__
        raise AddendaError(
            f"{site.path} is a raw parameter of a {kind}, which does not work token by token, so "
            f"{kinds} cannot give each part its own. Leave it out of the adapters with exclude=, or stack them."
        )


def _check_rows(root: nn.Module, composition: Composition) -> None:
    """Raise AddendaError where tokens are picked row by row for a method that must see the sequence."""
    for split in composition.within():
        if not isinstance(split, Split) or split.by is None:
            continue
        for name in split.names():
            following = [p for p, m in record_of(root, name).record.methods.items() if getattr(m, "follows", False)]
            if following:
                raise AddendaError(
                    f"{name!r} counts the tokens of a sequence ({following[0]}), and a Split by rows or by= gives it "
                    "some of them only. Split by sizes=(…) that all rows share."
                )
