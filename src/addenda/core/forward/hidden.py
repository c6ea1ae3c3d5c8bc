"""The forward of a module under hidden methods, which change what it returns."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.tensors import SiteTensors
from addenda.core.modules.autocast import autocast_dtype, switched_off, without_autocast
from addenda.core.modules.recompute import as_recipe
from addenda.core.modules.returned import version_of

Cut = Callable[[Tensor], Tensor]  # the part of the batch or of the sequence that a composition looks at


def run(live: Sequence[SiteTensors], act: Callable, base: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a module's own forward `base` and return its output with the hidden changes.

    live: every adapter's tensors that may act here; act(one, v): the changed value, where one(tensors, v, cut) is the
    change of one adapter (in place of "one after another" a composition may stand), and one(tensors, v, cut, changes)
    that of one which weighs the changes of others. one(tensors, v, cut, x=x): it reads x, not what its place says.
    """
    argument: Any = args[0] if args else next(iter(kwargs.values()), None)
    version = version_of(argument)
    if any(t.reads == "again" for t in live):
        if not isinstance(argument, Tensor):
            raise AddendaError(f"{live[0].path}: wants a tensor as the first argument, got {type(argument).__name__}.")

        def again(v: Tensor) -> Tensor:
            y = base(v, *args[1:], **kwargs) if args else base(**{next(iter(kwargs)): v}, **dict([*kwargs.items()][1:]))
            if not isinstance(y, Tensor):
                raise AddendaError(f"{live[0].path}: what runs again must return a tensor, not a {type(y).__name__}.")
            return y

        facts = _told(live, argument)

        def before(t: SiteTensors, v: Tensor, cut: Cut, *more, x: Tensor | None = None) -> Tensor:
            if t.reads != "again":
                return v
            stamp = version_of(v)
            x = again(v) if x is None else x
            return _change(t, x, _unchanged(t, v, stamp), facts, cut, *more)

        out = again(act(before, argument))
        if all(t.reads == "again" for t in live):
            return out
    else:
        out = base(*args, **kwargs)
    y, extras = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
    if not isinstance(y, Tensor):
        raise AddendaError(
            f"{live[0].path}: an activation can be changed where a module returns a tensor, or a tuple that starts "
            f"with one; this one returned {type(out).__name__}. Name a module inside it."
        )

    def one(t: SiteTensors, v: Tensor, cut: Cut, *more, x: Tensor | None = None) -> Tensor:
        if t.reads == "again":
            return v
        if t.reads == "output":
            return _change(t, v if x is None else x, v, facts, cut, *more)
        x = cut(_unchanged(t, argument, version) if t.reads == "input" else _seen(t))
        return _change(t, x, v, facts, cut, *more)

    facts = _told(live, y)
    try:
        y = act(one, y)
    finally:
        for t in live:
            for source in t.source:
                source.done()
    return y if extras is None else (y, *extras)


def undone(live: Sequence[SiteTensors], mixed: "Mixed | None", args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Undo changes made elsewhere in a module's first argument, the last change first; return its args and kwargs."""
    v = args[0] if args else next(iter(kwargs.values()))

    def one(t: SiteTensors, v: Tensor, cut: Cut, *more) -> Tensor:
        if not t.method.has("undo"):
            return v
        with without_autocast(v.device.type):
            return t.method.undo(v, t.tensors())

    v = mixed.act(one, v, back=True) if mixed is not None else in_turn(live[::-1])(one, v)
    return ((v, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): v})


def in_turn(live: Sequence[SiteTensors]) -> Callable:
    """Return how several changes act unless a composition says otherwise: one after another."""

    def act(one: Callable, v: Tensor) -> Tensor:
        for t in live:
            v = one(t, v, _all)
        return v

    return act


def _all(v: Tensor) -> Tensor:
    return v


def _seen(t: SiteTensors) -> Tensor:
    (source,) = t.source
    x = source.here.seen
    if x is None:
        raise AddendaError(
            f"{t.path}: {t.method.name} reads the input of a module that has not run before it in this forward. Run "
            "the whole model, and checkpoint whole blocks rather than parts of them."
        )
    return _unchanged(t, x, source.here.version)


def _unchanged(t: SiteTensors, x: Any, version: int | None) -> Any:
    """Return x. Raises AddendaError where it was changed in place since this version of it."""
    if version is not None and version_of(x) not in (None, version):
        raise AddendaError(
            f"{t.path}: {t.method.name} reads the input of a module, which the model has changed in place since, as "
            "by add_(), += or ReLU(inplace=True). Let the model change a copy (x + y, inplace=False), or use a method "
            "that reads what a module returns."
        )
    return x


def _told(live: Sequence[SiteTensors], y: Any) -> "tuple | None":
    """Return (length of the cache, past, mask) of the sequences in y, for methods that follow the call; or None."""
    following = [t for t in live if t.past is not None]
    facts = following[0].past.facts() if following else None
    if facts is None or not any(t.method.masked for t in following):
        return None if facts is None else (facts.length, facts.length, None)
    return (facts.length, *facts.of(y))


def _follow(t: SiteTensors, facts: "tuple | None", cut: Cut) -> dict[str, Any]:
    """Return the keyword arguments of a method that follows its call, cut to the part of the batch that it sees."""
    length, past, mask = (None, None, None) if facts is None else facts
    if not t.method.masked:
        return {"past": length}
    if isinstance(past, Tensor) and past.dim() and mask is not None:
        past = cut(past.expand(mask.shape))[:, :1]
    return {"past": past, "mask": None if mask is None else cut(mask)}


def _change(
    t: SiteTensors, x: Any, y: Tensor, facts: "tuple | None", cut: Cut, changes: list[Tensor] | None = None
) -> Tensor:
    """Apply one adapter's change, under autocast in the dtype of its products."""
    if not isinstance(x, Tensor) or x.shape != y.shape or y.shape[-1:] != (t.width,):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise AddendaError(
            f"{t.path}: {t.method.name} reads {shape} and changes {tuple(y.shape)}: both must be "
            f"(…, {t.width}). Name another module with targets=."
        )
    t.refuse_absent(y)
    device, p = y.device.type, t.tensors()
    autocast = autocast_dtype(device)
    if autocast is not None and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(autocast)
    extras = {} if t.past is None else _follow(t, facts, cut)
    with as_recipe(x), switched_off(device, autocast):
        return t.method.change(x, y, p, t.training, **extras) if changes is None else t.method.fuse(x, y, changes, p)
