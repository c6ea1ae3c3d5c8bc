"""How many tokens of every sequence a model has in a cache already, for methods that count places from the first one.

The modules around a model's blocks are given `past_key_values`, as transformers calls it. A hook in front of them notes
how long that cache is, before the blocks make it longer. Where no module takes such an argument, or what it is given
does not tell its length, nothing is known.
"""

import inspect
from dataclasses import dataclass

from torch import Tensor, nn

from addenda.core.adapted import SiteTensors, original_class
from addenda.core.hidden import HiddenMethod

CACHE = "past_key_values"


@dataclass(eq=False)
class Past:
    """length: as noted last; a tensor () from caches of fixed size, which count on the device; None: not known."""

    length: int | Tensor | None = None


@dataclass(eq=False)
class _Look:
    """A forward pre-hook of a module whose argument number `place` is the cache."""

    past: Past
    place: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = args[self.place] if len(args) > self.place else kwargs.get(CACHE)
        told = hasattr(cache, "get_seq_length")
        length: int | Tensor | None = 0 if cache is None else cache.get_seq_length() if told else None
        self.past.length = length.clone() if isinstance(length, Tensor) else length  # the cache counts in place


def follow(root: nn.Module) -> None:
    """Tell the tensors of every method that follows a cache of its length; take the hooks off where none does."""
    following = []
    for module in root.modules():
        if isinstance(module, SiteTensors) and _follows(module.method):
            following.append(module)
        for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, _Look)]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    past, around = Past(), _around(root) if following else []
    for module in around:
        module.register_forward_pre_hook(_Look(past, _takes(module).index(CACHE)), with_kwargs=True)
    for tensors in following:
        tensors.past = past if around else None


def _follows(method: object) -> bool:
    return isinstance(method, HiddenMethod) and method.follows


def _takes(module: nn.Module) -> list[str]:
    return list(inspect.signature(original_class(module).forward).parameters)[1:]


def _around(root: nn.Module) -> list[nn.Module]:
    """The modules that take a cache, but for those in lists of blocks, where it grows from one to the next."""
    found, waiting = {}, [root]
    while waiting:
        module = waiting.pop()
        found[id(module)] = module
        waiting += [m for m in module.children() if not isinstance(m, nn.ModuleList) and id(m) not in found]
    return [m for m in found.values() if CACHE in _takes(m)]
