"""Compositions of adapters one after another, averaged, or weighed by attention; see `compose.composition`.

**The residual of MAD-X** (Pfeiffer et al. 2020, arXiv:2005.00052). With o what the module's own part returns, h the
residual of the block, s = o + h, and LN the norm behind the sum (the identity in models that normalise before):

    z_1 = o + Δ_1(LN(s)),    z_i = o + Δ_i(z_(i−1)),    the site's result is h + z_k = s + Δ_k(z_(k−1))

Each part skips from o alone, so that what the first one made reaches the result through the second. Where an adapter
changes o before the sum there is no h: z_1 = o + Δ_1(o).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors

Part = Any  # before binding: a name, None, or a Composition; after it: SiteTensors, None, or a Composition
Cut = Callable[[Tensor], Tensor]
Held = Mapping[Any, SiteTensors | None]  # an adapter's tensors at one site by name; None: it has none there


class Way(Protocol):
    """How parts act at one kind of site; see `compose.ways`."""

    seen: Any  # what was noted of the running forward
    least: int  # dimensions of an input that has a batch, without tokens
    images: bool  # whether behind the batch stand channels, and no tokens
    back: bool  # whether changes are undone

    def run(self, part: Part, v: Tensor, cut: Cut) -> Tensor: ...
    def at(self, piece: Cut) -> "Way": ...
    def chain(self, parts: Sequence[Part], v: Tensor, cut: Cut, own: bool = False) -> Tensor: ...
    def fuse(self, by: Any, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor: ...


class Composition:
    """Base class of compositions: parts that act together; see the module."""

    outside = False  # whether it repeats the batch, and therefore stands outside
    leave_out: Any = ()  # layers in which it does not act
    spreads = False  # whether its parts see other tokens or examples, so that what acts on all of them acts in each

    def __init__(self, *parts: Part):
        self.parts = parts
        self.key = self  # of what is known of this composition, for those that are made of it
        if not parts:
            raise AddendaError(f"{type(self).__name__} wants at least one adapter.")
        for part in parts:
            if isinstance(part, Composition) and part.outside:
                raise AddendaError(
                    f"Parallel repeats the whole batch and stands outside, not in {type(self).__name__}."
                )
            if not (part is None or isinstance(part, (str, Composition, SiteTensors))):
                raise AddendaError(
                    f"{type(self).__name__} takes names of adapters, None or compositions, not {part!r}."
                )

    def names(self) -> list[str]:
        """Return the adapters that take part, each once."""
        return list(dict.fromkeys(n for part in self.parts for n in names_in(part)))

    def within(self) -> "Iterator[Composition]":
        """Yield this composition and all those in it."""
        yield self
        for part in self.parts:
            if isinstance(part, Composition):
                yield from part.within()

    def bound(self, held: Held) -> "Composition":
        """Return the same composition of the tensors at one site."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.parts = tuple(p.bound(held) if isinstance(p, Composition) else held.get(p) for p in self.parts)
        return twin

    def plain(self, held: Held) -> tuple[SiteTensors, ...] | None:
        """Return the tensors that act here one after another on everything, or None where there is more to it."""
        lists = [plain_in(p, held) for p in self.parts]
        return lists[0] if all(same(lists[0], other) for other in lists[1:]) else None

    def act(self, way: Way, v: Tensor, cut: Cut) -> Tensor:
        """Return what this site makes of v. cut: the part of the batch and of the tokens that v is of."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"

    def without(self, layers: Any) -> "Composition":
        """Return the same composition that does not act in some layers; see `composed`'s leave_out."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.leave_out = layers
        return twin


class Stack(Composition):
    """A composition of parts one after another: b(a(v)). Changes of weights add up.

    skip: what a change of activations is added to: "last", what the part before it made, or "own", what the module
    itself returned, which is MAD-X's residual.
    """

    def __init__(self, *parts: Part, skip: Literal["last", "own"] = "last"):
        super().__init__(*parts)
        if skip not in ("last", "own"):
            raise AddendaError(f"Stack's skip is 'last' or 'own', got {skip!r}.")
        self.skip = skip
        found: set[str] = set()
        for part in parts:
            again = found.intersection(names_in(part))
            if again:
                raise AddendaError(
                    f"{self!r} leads the same tokens through {min(again)!r} twice, whose change would count double. "
                    "Name an adapter once."
                )
            found.update(names_in(part))
        if skip == "own" and any(
            isinstance(c, Fuse) for p in parts[1:] if isinstance(p, Composition) for c in p.within()
        ):
            raise AddendaError("With skip='own' a Fuse is a Stack's first part: it weighs what the module itself made.")

    def plain(self, held: Held) -> tuple[SiteTensors, ...] | None:
        lists = [plain_in(p, held) for p in self.parts]
        acting = [found for found in lists if found != ()]
        own = self.skip == "own" and len(acting) > 1
        if any(found is None or (own and any(t.reads for t in found)) for found in acting):
            return None
        return tuple(t for found in acting for t in found or ())

    def act(self, way: Way, v: Tensor, cut: Cut) -> Tensor:
        return way.chain(self.parts, v, cut, own=self.skip == "own")

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + (", skip='own')" if self.skip == "own" else ")")


class Average(Composition):
    """A composition that returns the weighted mean of its parts' outputs.

    weights: all equal if not given. normalize: scale them to a sum of 1. The parts run one by one: on weights each
    costs a product of the base's size.
    """

    def __init__(self, *parts: Part, weights: Sequence[float] | None = None, normalize: bool = True):
        super().__init__(*parts)
        if weights is not None and not (
            isinstance(weights, Iterable) and all(isinstance(w, int | float) for w in weights)
        ):
            got = list(weights) if isinstance(weights, list | tuple) else repr(weights)[:80]
            raise AddendaError(f"The weights of Average are numbers in a list, one for each part, got {got}.")
        values = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
        if len(values) != len(parts) or not all(map(math.isfinite, values)):
            raise AddendaError(f"Average of {len(parts)} wants as many finite weights, got {values}.")
        if not any(values):
            raise AddendaError(f"Average wants a weight that is not 0, got {values}.")
        if normalize and abs(sum(values)) < 1e-12:
            raise AddendaError(f"The weights {values} sum to 0 and cannot be scaled to 1; use normalize=False.")
        self.weights = [w / sum(values) for w in values] if normalize else values

    def plain(self, held: Held) -> tuple[SiteTensors, ...] | None:
        weighed = [(w, plain_in(p, held)) for p, w in zip(self.parts, self.weights, strict=True) if w != 0]
        alike = all(same(weighed[0][1], found) for _, found in weighed[1:])
        return weighed[0][1] if alike and abs(sum(w for w, _ in weighed) - 1) < 1e-12 else None

    def act(self, way: Way, v: Tensor, cut: Cut) -> Tensor:
        if way.back and len(self.parts) > 1:
            raise AddendaError(
                "An average of changes that are undone before the head has no such inverse: the mean of inverses is "
                "another function. Stack or split these adapters."
            )
        outputs = [(w, way.run(p, v, cut)) for p, w in zip(self.parts, self.weights, strict=True) if w != 0]
        y = outputs[0][1] if outputs[0][0] == 1 else outputs[0][0] * outputs[0][1]
        for w, output in outputs[1:]:
            y = y + w * output
        return y


class Fuse(Composition):
    """A composition by attention over the parts' changes, with a trained adapter; see the `fusion` method.

    by: its name. Where it has no tensors the parts' changes are left out.
    """

    def __init__(self, *parts: Part, by: str):
        super().__init__(*parts)
        if not isinstance(by, str):
            raise AddendaError(f"Fuse's by= is the name of the adapter that weighs the others, got {by!r}.")
        self.by = by

    def names(self) -> list[str]:
        return list(dict.fromkeys([*super().names(), self.by]))

    def bound(self, held: Held) -> "Composition":
        twin: Any = super().bound(held)
        twin.by = held.get(self.by)
        return twin

    def plain(self, held: Held) -> tuple[SiteTensors, ...] | None:
        return () if not any(held.get(n) for n in self.names()) else None

    def act(self, way: Way, v: Tensor, cut: Cut) -> Tensor:
        return way.fuse(self.by, self.parts, v, cut)


def names_in(part: Part) -> list[str]:
    """Return the names of the adapters in a part, each once."""
    return part.names() if isinstance(part, Composition) else [] if part is None else [part]


def plain_in(part: Part, held: Held) -> tuple[SiteTensors, ...] | None:
    """Return what `Composition.plain` does, of any part."""
    if isinstance(part, Composition):
        return part.plain(held)
    tensors = held.get(part)
    return () if tensors is None else (tensors,)


def same(one: tuple[SiteTensors, ...] | None, other: tuple[SiteTensors, ...] | None) -> bool:
    """Return whether two lists are known and hold the very same tensors in the same order."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a is b for a, b in zip(one, other, strict=True))
