"""Hidden methods: what happens to the activations that a module returns; and how the core runs them.

    v' = change(x, v)        v: the value that is changed, what the module returns;  x: what the change reads

Where x comes from is a property of the site (`sites.Point`) and written into its path, so that one method serves in
all places of the literature:

| path       | x                   | what is changed                | for example                                     |
| ---------- | ------------------- | ------------------------------ | ----------------------------------------------- |
| `A@output` | A's output itself   | A's output                     | a serial adapter after attention                |
| `A@input`  | A's input           | A's output                     | a parallel adapter beside A                     |
| `A@B`      | B's input           | A's output                     | parallel: the MLP's last layer, its first's x   |
| `A@again`  | A(v)                | A's input v, then A runs again | before a residual sum is normalised once more   |

Several live changes at one module act one after another, in the order of activation. All of `A@again` come first.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.method.contract import Method, Params
from addenda.core.modules.recompute import as_recipe
from addenda.core.modules.returned import version_of

if TYPE_CHECKING:
    from addenda.core.forward.adapted import SiteTensors
    from addenda.core.forward.per_example import Mixed

Reads = Literal["output", "input", "residual", "sum", "stream"]
Cut = Callable[[Tensor], Tensor]  # the part of the batch or of the sequence that a composition looks at


@dataclass(frozen=True)
class HiddenMethod(Method):
    """Base class of every method that changes activations of some width d: (…, d) to (…, d).

    targets: parts of a transformer's blocks ("attention", "mlp", "block"; see `core.site.structure`), or modules.
    reads: what x is, for a part that runs from a first layer to a last one whose output is changed:

        "output"     what is changed itself (a serial adapter)
        "input"      what the part's first layer reads (a parallel one)
        "residual"   the same before the norm in front of the part, where there is one
        "stream"     the sum of the part's output and the residual, nothing normalised: x is the residual, y is added
        "sum"        the sum of the part's output and the residual: normalised where the model normalises after the
                     sum, which then happens again after the change; the block's output where it normalises before
    """

    targets: ClassVar[str | tuple[str, ...]] = "mlp"
    reads: ClassVar[Reads] = "output"  # or a field, where it is an option
    follows: ClassVar[bool] = False  # whether `change` is told how much of the sequence a cache has (past=)
    masked: ClassVar[bool] = False  # whether it is told which tokens are padding too (mask=)
    one_side: ClassVar[bool] = False  # of an encoder and a decoder the parts of one, see `core.site.structure`

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        """Trainable (`nn.Parameter`) and frozen (plain) tensors for activations of this width."""
        raise NotImplementedError

    def change(self, x: Tensor, y: Tensor, p: Params, training: bool = False) -> Tensor:
        """y' (…, d) from y (…, d) and x (…, d): pure and differentiable. x is y in a serial place.

        x has the dtype of the products, y may have another; y' has y's. Tensors in p keep their own. Neither x nor y
        is written to. training: whether dropout acts. Methods that follow a cache take past= too: how many tokens of
        every sequence are in it already, an int, a tensor () or, of each sequence, a tensor (batch, 1); None where that
        is not known. With `masked` they take mask= too: (batch, tokens), false where a token is padding, which `past`
        does not count either; None where all count. See `core.state.cache_length`.
        """
        raise NotImplementedError

    def fuse(self, x: Tensor, y: Tensor, changes: list[Tensor], p: Params) -> Tensor:
        """Optional, for methods that weigh others: y' from y and what each other adapter would add to it (…, d)."""
        raise NotImplementedError

    def undo(self, y: Tensor, p: Params) -> Tensor:
        """Optional: v from v' = change(v, v), for changes that are taken back before a model's head."""
        raise NotImplementedError

    def trainable(self, width: int) -> int:
        """How many numbers are trained at one place of this width: a formula, tested against the real tensors."""
        raise NotImplementedError

    def check(self, width: int) -> str | None:
        """Why activations of this width cannot be changed with these options, or None."""
        return None


HiddenMethod._kind = HiddenMethod


def run(live: "Sequence[SiteTensors]", act: Callable, base: Callable, args: tuple, kwargs: dict) -> Any:
    """What a module returns with hidden changes, from its own forward `base`.

    live: every adapter's tensors that may act here; act(one, v): the changed value, where one(tensors, v, cut) is the
    change of one adapter (in place of "one after another" a composition may stand), and one(tensors, v, cut, changes)
    that of one which weighs the changes of others.
    """
    given: Any = args[0] if args else next(iter(kwargs.values()), None)
    version = version_of(given)
    if any(t.reads == "again" for t in live):
        if not isinstance(given, Tensor):
            raise AddendaError(f"{live[0].path}: wants a tensor as the first argument, got {type(given).__name__}.")

        def again(v: Tensor) -> Tensor:
            y = base(v, *args[1:], **kwargs) if args else base(**{next(iter(kwargs)): v}, **dict([*kwargs.items()][1:]))
            if not isinstance(y, Tensor):
                raise AddendaError(f"{live[0].path}: what runs again must return a tensor, not a {type(y).__name__}.")
            return y

        told = _told(live, given)

        def before(t: "SiteTensors", v: Tensor, cut: Cut, *more) -> Tensor:
            if t.reads != "again":
                return v
            now = version_of(v)
            x = again(v)
            return _change(t, x, _unchanged(t, v, now), told, cut, *more)

        out = again(act(before, given))
        if all(t.reads == "again" for t in live):
            return out
    else:
        out = base(*args, **kwargs)
    y, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
    if not isinstance(y, Tensor):
        raise AddendaError(
            f"{live[0].path}: an activation can be changed where a module returns a tensor, or a tuple that starts "
            f"with one; this one returned {type(out).__name__}. Name a module inside it."
        )

    def one(t: "SiteTensors", v: Tensor, cut: Cut, *more) -> Tensor:
        if t.reads == "again":
            return v
        if t.reads == "output":
            return _change(t, v, v, told, cut, *more)
        x = cut(_unchanged(t, given, version) if t.reads == "input" else _seen(t))
        return _change(t, x, v, told, cut, *more)

    told = _told(live, y)
    try:
        y = act(one, y)
    finally:
        for t in live:
            for source in t.source:
                source.done()
    return y if rest is None else (y, *rest)


def undone(live: "Sequence[SiteTensors]", mixed: "Mixed | None", args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A module's arguments, the first with the inverse of what `live` changed elsewhere, the last change first."""
    v = args[0] if args else next(iter(kwargs.values()))

    def one(t: "SiteTensors", v: Tensor, cut: Cut, *more) -> Tensor:
        if not t.method.has("undo"):
            return v
        with torch.autocast(v.device.type, enabled=False):
            return t.method.undo(v, t.tensors())

    v = mixed.act(one, v, back=True) if mixed is not None else in_turn(live[::-1])(one, v)
    return ((v, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): v})


def in_turn(live: "Sequence[SiteTensors]") -> Callable:
    """One change after another: how several act unless a composition says otherwise."""

    def act(one: Callable, v: Tensor) -> Tensor:
        for t in live:
            v = one(t, v, _all)
        return v

    return act


def _all(v: Tensor) -> Tensor:
    return v


def _seen(t: "SiteTensors") -> Tensor:
    (source,) = t.source
    seen = source.here.seen
    if seen is None:
        raise AddendaError(
            f"{t.path}: {t.method.name} reads the input of a module that has not run before it in this forward. Run "
            "the whole model, and checkpoint whole blocks rather than parts of them."
        )
    return _unchanged(t, seen, source.here.version)


def _unchanged(t: "SiteTensors", x: Any, version: int | None) -> Any:
    """x, which was kept at this version of it, unless it has been changed in place since."""
    if version is not None and version_of(x) not in (None, version):
        raise AddendaError(
            f"{t.path}: {t.method.name} reads the input of a module, which the model has changed in place since, as "
            "by add_(), += or ReLU(inplace=True). Let the model change a copy (x + y, inplace=False), or use a method "
            "that reads what a module returns."
        )
    return x


def _told(live: "Sequence[SiteTensors]", y: Any) -> "tuple | None":
    """What the running call says of the sequences in y, for those that follow it: (length of the cache, past, mask)."""
    following = [t for t in live if t.past is not None]
    facts = following[0].past.facts() if following else None
    if facts is None or not any(t.method.masked for t in following):
        return None if facts is None else (facts.length, facts.length, None)
    return (facts.length, *facts.of(y))


def _follow(t: "SiteTensors", told: "tuple | None", cut: Cut) -> dict[str, Any]:
    """The arguments of a method that follows its call, of the part of the batch or of the sequence that it sees."""
    length, past, mask = (None, None, None) if told is None else told
    if not t.method.masked:
        return {"past": length}
    if isinstance(past, Tensor) and past.dim() and mask is not None:
        past = cut(past.expand(mask.shape))[:, :1]
    return {"past": past, "mask": None if mask is None else cut(mask)}


def _change(
    t: "SiteTensors", x: Any, y: Tensor, told: "tuple | None", cut: Cut, changes: list[Tensor] | None = None
) -> Tensor:
    """One adapter's change, under autocast in the dtype of its products."""
    if not isinstance(x, Tensor) or x.shape != y.shape or y.shape[-1:] != (t.width,):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise AddendaError(
            f"{t.path}: {t.method.name} reads {got} and changes {tuple(y.shape)}: both must be "
            f"(…, {t.width}). Name another module with targets=."
        )
    device, p = y.device.type, t.tensors()
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    off = torch.autocast(device, enabled=False) if autocast else nullcontext()
    more = {} if t.past is None else _follow(t, told, cut)
    with as_recipe(x), off:
        return t.method.change(x, y, p, t.training, **more) if changes is None else t.method.fuse(x, y, changes, p)
