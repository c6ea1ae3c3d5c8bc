"""Several adapters in one forward, each for a group of the batch's rows: how a layer computes there.

Groups are contiguous and in the order of `Groups.parts`. Low-rank changes share the base's product, and their thin
products run batched (`batched`). For any other method, and for changes of activations and raw parameters, the layer's
rows are split by group and put together; the rest of the model is shared. A group's rows at its own length, without
what the others' made of padding, where a layer is split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.batched import batched_linear
from addenda.core.forward.execute import execute, thin
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.tensors import SiteTensors
from addenda.core.modules.autocast import autocast_dtype
from addenda.core.modules.streams import Stream, Streams
from addenda.core.site.kinds import LINEAR, Kind


@dataclass(frozen=True)
class Part:
    """A group of a forward: which adapter it takes, and its rows with the stream that they draw from.

    stream None: all rows of the forward are this group's, however many.
    """

    slot: int
    stream: Stream | None = None


@dataclass(eq=False)
class Groups:
    """What the rows of the running forward are, for all layers. Whoever runs forwards sets it before each."""

    parts: tuple[Part, ...] = ()
    long: int | None = None  # tokens in a row of the batch, padding too
    labels: tuple[int, ...] = ()  # of each group: rows of what reads only where something is predicted
    drawn: Streams = field(default_factory=lambda: Streams(()))

    def set(self, parts: Sequence[Part], long: int | None = None, labels: Sequence[int] = ()) -> None:
        """Say what the rows of the next forward are."""
        self.parts, self.long, self.labels = tuple(parts), long, tuple(labels)
        self.drawn = Streams([p.stream for p in parts if p.stream is not None], long)

    def cuts(self, x: Tensor, where: str) -> list[tuple[Part, slice]]:
        """Return the rows of x (the batch, or its rows flattened, or its labels) that belong to each group.

        Raises AddendaError where x has rows of another number.
        """
        first = self.parts[0]
        if first.stream is None:
            return [(first, slice(None))]
        sizes = [p.stream.rows for p in self.parts if p.stream is not None]
        if x.dim() == 2 and self.labels and len(x) == sum(self.labels):
            sizes = list(self.labels)
        per, rest = divmod(len(x), sum(sizes)) if x.dim() else (0, 1)
        if rest or not per:
            raise AddendaError(
                f"{where} got {tuple(x.shape)} in a batch of {sum(sizes)} rows, and each group of rows has an adapter "
                "of its own: the first dimension of what an adapted module reads must be the batch. Train it alone."
            )
        found, at = [], 0
        for part, size in zip(self.parts, sizes, strict=True):
            found.append((part, slice(at * per, (at + size) * per)))
            at += size
        return found


@dataclass(frozen=True, eq=False)
class Grouped(Mixed):
    """A composition with one adapter for each group of rows. held: the tensors of all slots here, None: none."""

    held: tuple[SiteTensors | None, ...]
    groups: Groups

    def layer(self, module: nn.Module, original: type, kind: Kind, x: Tensor, *rest, **options) -> Tensor:
        """Return the layer's output, each group of x's rows with its own adapter."""
        cuts = self.groups.cuts(x, type(module).__name__)
        if len(cuts) == 1:
            return self._one(module, original, kind, cuts[0][0], x, rest, options)
        made = []
        for batched, run in _runs(cuts, lambda part: self._can_batch(module, original, kind, x, part)):
            rows = x[run[0][1].start : run[-1][1].stop]
            if batched and len(run) > 1:
                sizes = [at.stop - at.start for _, at in run]
                made.append(self._batched(module, kind, [p for p, _ in run], rows, sizes))
            else:
                made += [self._one(module, original, kind, p, x[at], rest, options) for p, at in run]
        return made[0] if len(made) == 1 else torch.cat(made)

    def act(self, one: Callable, v: Tensor, back: bool = False) -> Tensor:
        made = []
        for part, at in self.groups.cuts(v, "a change of activations"):
            t = self.held[part.slot]
            with self.groups.drawn.only(part.stream):
                made.append(v[at] if t is None else one(t, v[at], lambda z, at=at: z[at]))
        return made[0] if len(made) == 1 else torch.cat(made)

    def _one(self, module, original, kind: Kind, part: Part, x: Tensor, rest: tuple, options: dict) -> Tensor:
        """Return the output for one group alone."""
        t = self.held[part.slot]
        if t is None:
            return original.forward(module, x, *rest, **options)  # type: ignore[attr-defined]
        long, own = self.groups.long, None if part.stream is None else part.stream.length
        shorter = kind.dense and own is not None and own != long and x.dim() == 3 and x.shape[1] == long
        with self.groups.drawn.only(part.stream):
            y = execute(module, original, kind, (t,), x[:, :own] if shorter else x, *rest, **options)
        return F.pad(y, (0, 0, 0, x.shape[1] - y.shape[1])) if shorter else y

    def _can_batch(self, module: nn.Module, original: Any, kind: Kind, x: Tensor, part: Part) -> bool:
        """Return whether this group's change is one of thin factors that are worth a place in the batched products."""
        t, weight = self.held[part.slot], module._parameters.get("weight")
        plain = kind.dense and (original.forward is nn.Linear.forward or kind != LINEAR)
        if t is None or weight is None or not plain or not thin(t.method) or weight.requires_grad:
            return False
        if x.dim() < 2 or autocast_dtype(x.device.type) is not None:
            return False
        m, n = kind.to_matrix(weight).shape
        rank = getattr(t.method, "rank", 0)
        return rank > 0 and 2 * rank * (m + n) <= m * n and not t.stacked

    def _batched(self, module: nn.Module, kind: Kind, parts: Sequence[Part], x: Tensor, sizes: Sequence[int]) -> Tensor:
        weight: Any = module._parameters["weight"]
        W = kind.to_matrix(weight)
        here = [self.held[p.slot] for p in parts]
        live = [t for t in here if t is not None]
        pairs = [t.method.factors(t.tensors(), (W.shape[0], W.shape[1])).pair() for t in live]
        rank = max(len(A) for _, A in pairs)
        B = torch.stack([F.pad(b, (0, rank - b.shape[1])) if b.shape[1] < rank else b for b, _ in pairs]).to(x.dtype)
        A = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) if len(a) < rank else a for _, a in pairs]).to(x.dtype)
        streams = [p.stream for p in parts if p.stream is not None]
        shares = [t.method.dropout if t.training else 0.0 for t in live]
        mask = None
        if any(shares):
            mask = Streams(streams, self.groups.long).kept(x, shares)
            A = A / (1 - A.new_tensor(shares))[:, None, None]
        inner = x.shape[1:-1].numel()
        return batched_linear(x, W, getattr(module, "bias", None), B, A, [n * inner for n in sizes], mask)


def split(groups: Groups, run: Callable, where: str, args: tuple, kwargs: dict) -> Any:
    """Return what a module returns whose raw parameters each group has its own of: it runs once for each group.

    run(part, args, kwargs): the module's forward for a group. What has as many rows as its first argument is cut.
    """
    if groups.parts[0].stream is None:
        return run(groups.parts[0], args, kwargs)
    first = next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor)), None)
    if first is None:
        raise AddendaError(f"{where} is called without a tensor, so that no group of rows can be told. Train it alone.")
    made = []
    for part, at in groups.cuts(first, where):

        def cut(v: Any, at: slice = at) -> Any:
            return v[at] if isinstance(v, Tensor) and v.dim() and len(v) == len(first) else v

        with groups.drawn.only(part.stream):
            made.append(run(part, tuple(map(cut, args)), {k: cut(v) for k, v in kwargs.items()}))
    if len(made) == 1:
        return made[0]
    if isinstance(made[0], Tensor):
        return torch.cat(made)
    if isinstance(made[0], tuple) and all(isinstance(v, Tensor) for out in made for v in out):
        return tuple(torch.cat(column) for column in zip(*made, strict=True))
    raise AddendaError(f"{where} returns {type(made[0]).__name__}, which is not put together again. Train it alone.")


def _runs(cuts: list, asked: Callable[[Part], bool]) -> Iterator[tuple[bool, list]]:
    """Yield (answer, cuts) for neighbours with the same answer."""
    run: list = []
    before = False
    for part, at in cuts:
        now = asked(part)
        if run and now != before:
            yield before, run
            run = []
        before = now
        run.append((part, at))
    yield before, run
