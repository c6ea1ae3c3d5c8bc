"""Several adapters in one forward, composed: stacked, averaged, side by side, or weighed by attention.

    with ad.composed(model, ad.Stack("language", ad.Average("a", "b", weights=(2, 1)))):
        model(**batch)

At every site each part is the change that one adapter, or another composition, makes there:

| composition | what a site returns |
| --- | --- |
| `Stack("a", "b")` | b(a(v)): the second changes what the first made; for weights ΔW_a + ΔW_b |
| `Average("a", "b", weights=(2, 1))` | Σ w_i a_i(v), the weights scaled to a sum of 1 |
| `Split("a", "b", sizes=(3, None))` | a for the first 3 tokens, b for the rest |
| `BatchSplit("a", "b", sizes=(2, 6))` | a for the first 2 examples, b for the other 6 |
| `Parallel("a", "b")` | the batch twice at the model's input, its first copy through a, the second through b |
| `Fuse("a", "b", by="f")` | v + attention over a(v) − v and b(v) − v, by the trained adapter f |

A part is a name, None for the base alone, or a composition; `Parallel` stands outside. An adapter that has nothing at
a site leaves it as it is there. Layers see the batch as the first dimension and tokens as the second. Where both an
adapter's reading and what it changes are the same activation, "b(a(v))" means that b reads what a made; a parallel one
reads its own input in any case. Gradients reach every adapter that takes part. With gradient checkpointing backward may
run inside the block or behind it: what it computes again does as in its forward (`core.modules.late_backward`).

Blocks nest: inside another one, or inside `addenda.disabled`, that one acts alone, and afterwards the outer one again.
A block is the calling thread's or asyncio task's own, see `addenda.per_example`.

The parts of `Average` and of the splits run one by one: on weights each costs a product of the base's size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.blocks import arranged
from addenda.core.base.errors import AddendaError
from addenda.core.forward.acting import lock
from addenda.core.forward.execute import execute
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.kinds import EMBEDDING, Kind
from addenda.core.state.state import record_of, state_of

Part = Any  # before binding: a name, None, or a Composition; after it: SiteTensors, None, or a Composition
Cut = Callable[[Tensor], Tensor]


class Composition:
    """Base class of compositions: parts that act together; see the module."""

    def __init__(self, *parts: Part):
        self.parts = parts
        if not parts:
            raise AddendaError(f"{type(self).__name__} wants at least one adapter.")
        for part in parts:
            if isinstance(part, Parallel):
                raise AddendaError(
                    f"Parallel repeats the whole batch and stands outside, not in {type(self).__name__}."
                )
            if not (part is None or isinstance(part, (str, Composition, SiteTensors))):
                raise AddendaError(
                    f"{type(self).__name__} takes names of adapters, None or compositions, not {part!r}."
                )

    def names(self) -> list[str]:
        """Return the adapters that take part, each once."""
        groups = [p.names() if isinstance(p, Composition) else [p] for p in self.parts if p is not None]
        return list(dict.fromkeys(n for names in groups for n in names))

    def bound(self, held: dict[str, SiteTensors | None]) -> "Composition":
        """Return the same composition of the tensors at one site."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.parts = tuple(p.bound(held) if isinstance(p, Composition) else held.get(p) for p in self.parts)
        return twin

    def act(self, how: "_How", v: Tensor, cut: Cut) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"


class Stack(Composition):
    """A composition of parts one after another: b(a(v)). Changes of weights add up."""

    def act(self, how: "_How", v: Tensor, cut: Cut) -> Tensor:
        return how.chain(self.parts, v, cut)


class Average(Composition):
    """A composition that returns the weighted mean of its parts' outputs.

    weights: all equal if not given. normalize: scale them to a sum of 1.
    """

    def __init__(self, *parts: Part, weights: Sequence[float] | None = None, normalize: bool = True):
        super().__init__(*parts)
        values = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
        if len(values) != len(parts) or not all(map(math.isfinite, values)):
            raise AddendaError(f"Average of {len(parts)} wants as many finite weights, got {values}.")
        if not any(values):
            raise AddendaError(f"Average wants a weight that is not 0, got {values}.")
        if normalize and abs(sum(values)) < 1e-12:
            raise AddendaError(f"The weights {values} sum to 0 and cannot be scaled to 1; use normalize=False.")
        self.weights = [w / sum(values) for w in values] if normalize else values

    def act(self, how: "_How", v: Tensor, cut: Cut) -> Tensor:
        if how.back and len(self.parts) > 1:
            raise AddendaError(
                "An average of changes that are undone before the head has no such inverse: the mean of inverses is "
                "another function. Stack or split these adapters."
            )
        outputs = [(w, how.run(p, v, cut)) for p, w in zip(self.parts, self.weights, strict=True) if w != 0]
        y = outputs[0][1] if outputs[0][0] == 1 else outputs[0][0] * outputs[0][1]
        for w, output in outputs[1:]:
            y = y + w * output
        return y


class _Ranges(Composition):
    """A composition with other parts for other ranges of one dimension."""

    dim, what = 0, ""

    def __init__(self, *parts: Part, sizes: Sequence[int | None]):
        super().__init__(*parts)
        self.sizes = tuple(sizes)
        named = [s for s in self.sizes if s is not None]
        valid = all(isinstance(s, int) and s >= 0 for s in named)
        if len(self.sizes) != len(parts) or len(self.sizes) - len(named) > 1 or not valid:
            raise AddendaError(
                f"{type(self).__name__} of {len(parts)} wants as many sizes (numbers of {self.what}, at most one None "
                f"for the rest), got {self.sizes}."
            )

    def ranges(self, length: int) -> Iterator[tuple[int, int]]:
        total = sum(s for s in self.sizes if s is not None)
        if total > length or (None not in self.sizes and total != length):
            raise AddendaError(
                f"{type(self).__name__} gives {total} {self.what} to its parts, and a layer got {length}. The sizes "
                "must sum to that, or leave the rest to one part with None."
            )
        start = 0
        for size in self.sizes:
            end = start + (length - total if size is None else size)
            yield start, end
            start = end

    def act(self, how: "_How", v: Tensor, cut: Cut) -> Tensor:
        if v.dim() < how.least + self.dim:
            raise AddendaError(
                f"A layer got an input of shape {tuple(v.shape)}, which has no dimension of {self.what} for "
                f"{type(self).__name__}. Leave such layers out of the adapters with exclude=."
            )
        outputs = []
        for part, (start, end) in zip(self.parts, self.ranges(v.shape[self.dim]), strict=True):

            def inner(t: Tensor, start: int = start, end: int = end) -> Tensor:
                return cut(t).narrow(self.dim, start, end - start)

            outputs.append(how.run(part, v.narrow(self.dim, start, end - start), inner))
        return torch.cat(outputs, self.dim)


class Split(_Ranges):
    """A composition with other adapters for other tokens. sizes: how many each takes; None, once, for the rest."""

    dim, what = 1, "tokens"


class BatchSplit(_Ranges):
    """A composition with other adapters for other examples. See also `addenda.per_example`."""

    dim, what = 0, "examples"

    def __init__(self, *parts: Part, sizes: Sequence[int]):
        if None in sizes:  # a layer whose input is flat would take the rest for more examples
            raise AddendaError(f"BatchSplit wants every size, so that it can check the batch; got {tuple(sizes)}.")
        super().__init__(*parts, sizes=sizes)


class Parallel(Composition):
    """A composition that repeats the batch for every part: rows i·B to (i+1)·B of the output are those of part i.

    Every tensor among the model's arguments whose first dimension is the batch is repeated. That is not for `generate`,
    which picks the next token of each row that it was given: repeat the inputs, and let `BatchSplit` share them out.
    """

    def act(self, how: "_How", v: Tensor, cut: Cut) -> Tensor:
        if len(v) % len(self.parts):
            raise AddendaError(
                f"Parallel of {len(self.parts)} got {len(v)} rows in a layer, which is no multiple of it."
            )
        split = BatchSplit(*self.parts, sizes=[len(v) // len(self.parts)] * len(self.parts))
        return split.act(how, v, cut)

    def repeat(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the model's arguments with the batch of each repeated."""
        batch = next((len(t) for t in [*args, *kwargs.values()] if isinstance(t, Tensor) and t.dim()), None)
        if batch is None:
            raise AddendaError("Parallel found no tensor among the model's arguments to repeat.")

        def repeated(t: Any) -> Any:
            fits = isinstance(t, Tensor) and t.dim() > 0 and len(t) == batch
            return torch.cat([t] * len(self.parts)) if fits else t

        return tuple(map(repeated, args)), {k: repeated(t) for k, t in kwargs.items()}


class Fuse(Composition):
    """A composition by attention over the parts' changes, with a trained adapter; see the `fusion` method.

    by: its name. Where it has no tensors the parts' changes are left out.
    """

    def __init__(self, *parts: Part, by: str):
        super().__init__(*parts)
        self.by = by

    def names(self) -> list[str]:
        return list(dict.fromkeys([*super().names(), self.by]))

    def bound(self, held: dict[str, SiteTensors | None]) -> "Composition":
        twin: Any = super().bound(held)
        twin.by = held.get(self.by)
        return twin

    def act(self, how: "_How", v: Tensor, cut: Cut) -> Tensor:
        return how.fuse(self.by, self.parts, v, cut)


# -- how parts act at a site -------------------------------------------------------------------------------------------


class _How:
    """The way in which parts run, one by one, in a chain or fused, at one kind of site."""

    least = 2  # dimensions of an input that has a batch, without tokens
    back = False

    def run(self, part: Part, v: Tensor, cut: Cut) -> Tensor:
        if isinstance(part, Composition):
            return part.act(self, v, cut)
        return self.chain([part], v, cut)

    def chain(self, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        raise NotImplementedError

    def fuse(self, by: Any, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        raise NotImplementedError


class _Hidden(_How):
    """The way at changes of activations. v: what is changed. back: changes are undone, the last one first."""

    def __init__(self, one: Callable, back: bool):
        self.one, self.back = one, back

    def chain(self, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        for part in reversed(parts) if self.back else parts:
            if isinstance(part, Composition):
                v = part.act(self, v, cut)
            elif part is not None:
                v = self.one(part, v, cut)
        return v

    def fuse(self, by: Any, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        if by is None or self.back:
            return v
        return self.one(by, v, cut, [self.run(part, v, cut) - v for part in parts])


class _Weights(_How):
    """The way at changes of weights. v: the layer's input."""

    def __init__(self, module: nn.Module, original: Any, kind: Kind, rest: tuple, options: dict):
        self.module, self.original, self.kind, self.rest, self.options = module, original, kind, rest, options
        self.least = 1 if kind == EMBEDDING else 2

    def base(self, v: Tensor) -> Tensor:
        return self.original.forward(self.module, v, *self.rest, **self.options)

    def chain(self, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        live = tuple(p for p in parts if isinstance(p, SiteTensors))
        y = (
            execute(self.module, self.original, self.kind, live, v, *self.rest, **self.options)
            if live
            else self.base(v)
        )
        for part in parts:
            if isinstance(part, Composition):
                y = y + (part.act(self, v, cut) - self.base(v))
        return y

    def fuse(self, by: Any, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        raise AddendaError("Fuse weighs changes of activations; its parts here change weights. Use Average.")


@dataclass(frozen=True, eq=False)
class _Bound(Mixed):
    composition: Composition

    def layer(self, module: nn.Module, original: type, kind: Kind, x: Tensor, *rest, **options) -> Tensor:
        return self.composition.act(_Weights(module, original, kind, rest, options), x, lambda t: t)

    def act(self, one: Callable, v: Tensor, back: bool = False) -> Tensor:
        return self.composition.act(_Hidden(one, back), v, lambda t: t)


@contextmanager
def composed(model: nn.Module, composition: Composition) -> Iterator[None]:
    """Let a composition of adapters act for the length of a `with` block; afterwards what acted before acts again.

    Raises AddendaError for an unknown adapter, a merged change, a fusion that is none or shares no place with one of
    its parts, and raw parameters (among them heads trained with an adapter), which see no batch: only a plain Stack
    takes those.
    """
    if not isinstance(composition, Composition):
        raise AddendaError(f"Expected a composition such as Stack('a', 'b'), got {composition!r}.")
    root, _ = state_of(model)
    names = composition.names()
    _check_fusions(root, composition)

    def mix(held: list[SiteTensors | None]) -> Mixed:
        tensors = dict(zip(names, held, strict=True))
        return _Bound(tuple(t for t in held if t is not None), composition.bound(tensors))

    plain = isinstance(composition, Stack) and not any(isinstance(p, Composition) for p in composition.parts)
    with arranged(model, names, mix, names if plain else None) as acts, ExitStack() as stack:
        if isinstance(composition, Parallel):
            stack.enter_context(_repeated(root, composition, acts))
        yield


@contextmanager
def _repeated(root: nn.Module, parallel: Parallel, acts: Callable[[], bool]) -> Iterator[None]:
    """Repeat the model's batch in every forward while acts(), and make its `generate` refuse meanwhile."""

    def repeat(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return parallel.repeat(module, args, kwargs) if acts() else None

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


def _check_fusions(root: nn.Module, composition: Composition) -> None:
    """Raise AddendaError where a fusion is none, or could never see what one of its parts changes."""
    for part in composition.parts:
        if isinstance(part, Composition):
            _check_fusions(root, part)
    if not isinstance(composition, Fuse):
        return
    by, methods = composition.by, record_of(root, composition.by).record.methods
    if not any(isinstance(m, HiddenMethod) and m.has("fuse") for m in methods.values()):
        raise AddendaError(f"Fuse(by={by!r}) wants an adapter of a method that weighs others, such as fusion.")
    for part in composition.parts:
        names = part.names() if isinstance(part, Composition) else [] if part is None else [part]
        changed = {path: None for n in names for path in record_of(root, n).record.methods if "@" in path}
        if changed and not set(map(_place, changed)) & set(map(_place, methods)):
            raise AddendaError(
                f"Fuse(by={by!r}) weighs changes at {len(methods)} places, e.g. {next(iter(methods))}, and {part!r} "
                f"changes {len(changed)} others, e.g. {next(iter(changed))}: none is shared, so it would be left out. "
                "Attach the fusion where its adapters are, with its option reads= and targets=."
            )


def _place(path: str) -> tuple[str, bool]:
    """Return the place of a change: its module, and whether that runs again. Changes at one place can be weighed."""
    module, _, reads = path.partition("@")
    return module, reads == "again"
