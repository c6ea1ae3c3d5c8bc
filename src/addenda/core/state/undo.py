"""A call that fails leaves the model as it found it.

    with undone(model):        # classes, modules, parameters and buffers by name, hooks, flags, configuration
        ...                    # an error or Ctrl-C in here puts all of that back, and goes on its way

It keeps references, not copies: which tensors stand where, not their numbers. What writes into a tensor that the model
had before puts the numbers back by itself (`attach.restore`, `detach`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from addenda.core.state.state import State

_CONFIGS = ("config", "generation_config", "_addenda")  # plain objects of a module whose fields are kept too
_CONTAINERS = (dict, list, set)


@contextmanager
def undone(model: nn.Module | None) -> Iterator[None]:
    """Where the block ends with an error, of any kind, the model's structure is what it was before it; None: no model.

    A module that the block put in the place of another is taken out again, one that it took out is back. Costs a walk
    over all modules, and the memory of whatever the block would have let go of.
    """
    put_back = [] if model is None else _kept(model)
    try:
        yield
    except BaseException:
        for each in put_back:
            each()
        raise


def _kept(model: nn.Module) -> list[Callable[[], None]]:
    """What puts everything back, piece by piece."""
    held, seen = [], set()
    for module in model.modules():
        held.append(_fields_of(module))
        for name in _CONFIGS:
            found = module.__dict__.get(name)
            if found is not None and hasattr(found, "__dict__") and id(found) not in seen:
                seen.add(id(found))
                held.append(_fields_of(found))
                if isinstance(found, State):
                    held += [_fields_of(record) for record in found.records.values()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def put_flags() -> None:
        for p, flag, grad in flags:
            p.requires_grad_(flag)
            p.grad = grad

    return [*held, put_flags]


def _fields_of(thing: Any) -> Callable[[], None]:
    cls, now = type(thing), vars(thing)
    before = {k: (v, v.copy() if isinstance(v, _CONTAINERS) else None) for k, v in now.items()}

    def put() -> None:
        if type(thing) is not cls:
            thing.__class__ = cls
        now.clear()
        for name, (value, inside) in before.items():
            if inside is not None:
                value.clear()
                value.extend(inside) if isinstance(value, list) else value.update(inside)
            now[name] = value

    return put
