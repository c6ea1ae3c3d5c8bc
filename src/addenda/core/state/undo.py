"""Undoing a call that fails, so that the model's structure is as before it.

    with undone(model):        # classes, modules, parameters and buffers by name, hooks, flags, configuration
        ...                    # an error or Ctrl-C in here puts all of that back, and goes on its way

It keeps references, not copies: which tensors stand where, not their numbers. What writes into a tensor that the model
had before puts the numbers back by itself (`core.state.merged.restore`, `detach`).
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
    """Put the model's structure back where a `with` block ends with an error of any kind. None: no model.

    A module that the block put in the place of another is taken out again, one that it took out is back. Costs a walk
    over all modules, and the memory of whatever the block would have let go of.
    """
    put_back = [] if model is None else _kept(model)
    try:
        yield
    except BaseException:
        for restore in put_back:
            restore()
        raise


def _kept(model: nn.Module) -> list[Callable[[], None]]:
    """Return the functions that put everything back, piece by piece."""
    restorers, ids = [], set()
    for module in model.modules():
        restorers.append(_fields_of(module))
        for name in _CONFIGS:
            config = module.__dict__.get(name)
            if config is not None and hasattr(config, "__dict__") and id(config) not in ids:
                ids.add(id(config))
                restorers.append(_fields_of(config))
                if isinstance(config, State):
                    restorers += [_fields_of(record) for record in config.records.values()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def put_flags() -> None:
        for p, flag, grad in flags:
            p.requires_grad_(flag)
            p.grad = grad

    return [*restorers, put_flags]


def _fields_of(thing: Any) -> Callable[[], None]:
    cls, fields = type(thing), vars(thing)
    snapshot = {k: (v, v.copy() if isinstance(v, _CONTAINERS) else None) for k, v in fields.items()}

    def put() -> None:
        if type(thing) is not cls:
            thing.__class__ = cls
        fields.clear()
        for name, (value, contents) in snapshot.items():
            if contents is not None:
                value.clear()
                value.extend(contents) if isinstance(value, list) else value.update(contents)
            fields[name] = value

    return put
