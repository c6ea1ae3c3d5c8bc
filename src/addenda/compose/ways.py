"""How the parts of a composition run at a site: on activations, on a layer's weight, in a module with raw parameters.

A way runs its parts one by one (`run`), in a chain, or fused. On weights, what acts beside a `Split`, a `BatchSplit` or
a `Parallel` acts in each of its parts, so that a layer makes one product for all its tokens: Stack(Split(a, b), c) is
Split(a + c, b + c). Other compositions beside it add what they change: y + (part(v) − base(v)).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from addenda.compose.seen import Seen
from addenda.compose.stack import Composition, Cut, Part, Way
from addenda.core.base.errors import AddendaError
from addenda.core.forward.execute import execute
from addenda.core.forward.tensors import SiteTensors
from addenda.core.site.kinds import CONV, EMBEDDING, Kind


class _Way:
    """The way in which parts run, one by one, in a chain or fused, at one kind of site."""

    least, images = 2, False
    back = False

    def __init__(self, seen: Seen):
        self.seen = seen

    def run(self, part: Part, v: Tensor, cut: Cut) -> Tensor:
        """Return what one part makes of v."""
        if isinstance(part, Composition):
            return part.act(self, v, cut)
        return self.chain([part], v, cut)

    def at(self, piece: Cut) -> Way:
        """Return the way for a piece of what it was for."""
        return self

    def chain(self, parts: Sequence[Part], v: Tensor, cut: Cut, own: bool = False) -> Tensor:
        """Return what parts make of v one after another. own: each adds to the module's own v, see `stack`."""
        raise NotImplementedError

    def fuse(self, by: Any, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        """Return what an adapter makes of v and the changes of the parts."""
        raise NotImplementedError


class Hidden(_Way):
    """The way at changes of activations. v: what is changed. back: changes are undone, the last one first.

    x: what the first change reads in the place of what it would read.
    """

    def __init__(self, one: Callable, back: bool, seen: Seen, x: Tensor | None = None):
        super().__init__(seen)
        self.one, self.back, self.x = one, back, x

    def at(self, piece: Cut) -> Way:
        return self if self.x is None else Hidden(self.one, self.back, self.seen, piece(self.x))

    def chain(self, parts: Sequence[Part], v: Tensor, cut: Cut, own: bool = False) -> Tensor:
        acting = [p for p in parts if leaves(p)]
        if own and not self.back and len(acting) > 1:
            return self._own(acting, v, cut)
        x = self.x
        for part in reversed(acting) if self.back else acting:
            way = self if x is self.x else Hidden(self.one, self.back, self.seen, x)
            if isinstance(part, Composition):
                v = part.act(way, v, cut)
            else:
                v = self.one(part, v, cut) if x is None else self.one(part, v, cut, x=x)
            x = None
        return v

    def _own(self, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        """Return s + Δ_k(z_(k−1)) with z_i = o + Δ_i(z_(i−1)), of v = s = o + h, or of v = o where there is no h."""
        summed = next((t for p in parts for t in leaves(p) if t.method.reads == "sum"), None)
        h = None if summed is None else cut(self.seen.residual(summed.path))
        x, y = self.x, v
        for part in parts:
            y = Hidden(self.one, self.back, self.seen, x).run(part, v, cut)
            x = y if h is None else y - h.to(y.dtype)
        return y

    def fuse(self, by: Any, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        if by is None or self.back:
            return v
        return self.one(by, v, cut, [self.run(part, v, cut) - v for part in parts])


class _Adding(_Way):
    """The way where changes of weights add up. carried: leaves that act wherever a part does."""

    carried: tuple = ()

    def product(self, live: Sequence, v: Tensor, cut: Cut) -> Tensor:
        """Return the module's output under these changes."""
        raise NotImplementedError

    def carrying(self, live: Sequence) -> "_Adding":
        """Return the same way with other leaves that act in every part."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.carried = tuple(live)
        return twin

    def chain(self, parts: Sequence[Part], v: Tensor, cut: Cut, own: bool = False) -> Tensor:
        live = [*self.carried, *(p for p in parts if p is not None and not isinstance(p, Composition))]
        compositions = [p for p in parts if isinstance(p, Composition)]
        if len(compositions) == 1 and (compositions[0].spreads or not live):
            return compositions[0].act(self.carrying(live), v, cut)
        y, alone = self.product(live, v, cut), self.carrying(())
        for part in compositions:
            y = y + (part.act(alone, v, cut) - self.product((), v, cut))
        return y

    def fuse(self, by: Any, parts: Sequence[Part], v: Tensor, cut: Cut) -> Tensor:
        raise AddendaError("Fuse weighs changes of activations; its parts here change weights. Use Average.")


class Weights(_Adding):
    """The way at changes of a layer's weight. v: the layer's input."""

    def __init__(self, module: nn.Module, original: Any, kind: Kind, rest: tuple, options: dict, seen: Seen):
        super().__init__(seen)
        self.module, self.original, self.kind, self.rest, self.options = module, original, kind, rest, options
        self.least, self.images = 1 if kind == EMBEDDING else 2, kind == CONV

    def product(self, live: Sequence, v: Tensor, cut: Cut) -> Tensor:
        if live:
            return execute(self.module, self.original, self.kind, tuple(live), v, *self.rest, **self.options)
        return self.original.forward(self.module, v, *self.rest, **self.options)


class Whole(_Adding):
    """The way in a module of whose raw parameters the parts have other values: it runs for each of them.

    Leaves are names. run(tensors by parameter, v, rest, options): the module's forward under these changes.
    """

    def __init__(
        self,
        run: Callable,
        held: Mapping[str, Mapping],
        embeds: bool,
        rest: tuple,
        options: dict,
        rows: int,
        seen: Seen,
    ):
        super().__init__(seen)
        self.forward, self.held, self.rest, self.options, self.rows = run, held, rest, options, rows
        self.least = 1 if embeds else 2

    def product(self, live: Sequence, v: Tensor, cut: Cut) -> Tensor:
        def here(t: Any) -> Any:
            return cut(t) if isinstance(t, Tensor) and t.dim() and len(t) == self.rows else t

        tensors = {p: tuple(t for n in live if (t := held.get(n)) is not None) for p, held in self.held.items()}
        y = self.forward(tensors, v, tuple(map(here, self.rest)), {k: here(t) for k, t in self.options.items()})
        if not isinstance(y, Tensor):
            raise AddendaError(f"A module whose parameters differ by part returned a {type(y).__name__}, not a tensor.")
        return y


def leaves(part: Part) -> list[SiteTensors]:
    """Return the tensors that may act in a part, at one site."""
    if isinstance(part, Composition):
        by = getattr(part, "by", None)
        return [*([by] if isinstance(by, SiteTensors) else []), *(t for p in part.parts for t in leaves(p))]
    return [] if part is None else [part]
