"""What a call says of its sequences, for methods that count places: what a cache holds, and which tokens are padding.

transformers' models, and the stacks of blocks inside them, are given a cache and an attention mask. Hooks in front of
these modules note both for as long as the module runs, in the thread that runs it; behind it they are as before. So a
call knows nothing of another one, whatever raises in it or runs beside it. The innermost module that says something
counts: a decoder's mask in an encoder-decoder, not the encoder's. A stack that takes no cache beside one that does (an
encoder, an image tower) has none: there every token is new, also when `generate` runs it alone.

Where no module takes such arguments, or what it is given does not tell, nothing is known. Without a mask every token
counts, as the model itself then attends to padding too.
"""

import inspect
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.classes import original_class
from addenda.core.modules.late_backward import checkpointed, checkpoints, tell, used

CACHES = ("past_key_values", "cache", "past_key_value", "layer_past")  # the first one is transformers' before 5.24
MASK = "attention_mask"
_NO_CACHES = re.compile(r"use_cache|cache_position|past_key_values_length")  # of what sounds like one
_CLASS = re.compile(r"\b(\w*Cache)\b")


def cache_names(module: nn.Module) -> list[str]:
    """The arguments of a module's forward that are caches, by name or by the class that they are said to be of."""
    found = _arguments(module)
    return [n for n, p in found.items() if n in CACHES] or [
        n for n, p in found.items() if _CLASS.search(str(p.annotation)) and not _NO_CACHES.fullmatch(n)
    ]


def cache_of(output: Any) -> Any:
    """The cache that a model returns, under whichever of its names; None where it returns none."""
    said = vars(output) if hasattr(output, "__dict__") else {}
    return next((said[n] for n in CACHES if said.get(n) is not None), None)


def as_given(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache under the name that a module's forward takes it by."""
    return {next(iter(cache_names(module)), CACHES[0]): cache}


def _arguments(module: nn.Module) -> dict[str, inspect.Parameter]:
    found = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
    return {p.name: p for p in found}


@dataclass(frozen=True, eq=False)
class Facts:
    """length: of every sequence in the cache; a tensor () from caches that count on the device; None: not known.

    mask: (batch, columns), true for tokens and false for padding, the last columns for the tokens that come now; None
    where all count. unread: the class of a mask that cannot be read.
    """

    length: int | Tensor | None = None
    mask: Tensor | None = None
    unread: str = ""
    module: int = 0  # who says so
    outer: "Facts | None" = None  # what held before

    def of(self, activation: Tensor) -> tuple[int | Tensor | None, Tensor | None]:
        """(past, mask) of an activation (batch, tokens, …): see `HiddenMethod.change`."""
        length, mask = self.length, self.mask
        if self.unread:
            raise AddendaError(
                f"The attention mask is a {self.unread}, which does not say which tokens are padding, and the change "
                "counts tokens. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        if mask is None or activation.dim() < 3:
            return length, None
        batch, now = activation.shape[:2]
        if len(mask) not in (1, batch):
            raise AddendaError(
                f"The attention mask is {tuple(mask.shape)}, the change at activations {tuple(activation.shape)}: "
                "it counts the tokens that are no padding, and wants a mask of as many examples."
            )
        mask = mask.expand(batch, -1)
        columns = mask.shape[1]
        if columns < now:  # the model has made its input longer, at the end
            mask = torch.cat([mask, mask.new_zeros(batch, now - columns)], 1)
            columns = now
        if isinstance(length, Tensor):
            if columns == now:
                return length, mask
            place = (length + torch.arange(now, device=mask.device)).clamp(max=columns - 1)
            before = (mask & (torch.arange(columns, device=mask.device) < length)).sum(1, keepdim=True)
            return before, mask[:, place]
        end = columns if length is None else min(columns, length + now)
        start = end - now
        unseen = 0 if length is None else length - start  # what a mask of the newest tokens leaves out
        return mask[:, :start].sum(1, keepdim=True) + unseen, mask[:, start:end]


class _Here(threading.local):
    def __init__(self):
        self.facts: Facts | None = None


class Past:
    """What is said of the sequences now, in this thread: one for all hooks and all following tensors of a model."""

    def __init__(self):
        self.here = _Here()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.here = _Here()

    def facts(self) -> Facts | None:
        """Those of the running call; of the call that is computed again, in backward."""
        return self.here.facts if torch.compiler.is_compiling() else used(self, lambda: self.here.facts)


@dataclass(eq=False)
class _Enter:
    """A forward pre-hook. cache, mask: names and places of these arguments; None for a module that has none.

    length: what holds where no cache is among the arguments: 0 for a stack without one, None for what is around it.
    """

    past: Past
    cache: tuple[tuple[str, ...], int] | None
    mask: tuple[tuple[str, ...], int] | None
    alone: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        outer = self.past.here.facts
        length, mask, unread = (None, None, "") if outer is None else (outer.length, outer.mask, outer.unread)
        if self.cache is not None:
            length = _length(_given(self.cache, args, kwargs))
        elif self.alone:
            length = 0
        if self.mask is not None:
            mask, unread = _read(_given(self.mask, args, kwargs))
        elif self.alone:
            mask, unread = None, ""
        self.past.here.facts = Facts(length, mask, unread, id(module), outer)


@dataclass(eq=False)
class _Leave:
    """A forward hook: what held before holds again."""

    past: Past
    again: list[nn.Module]  # in the module, what may be computed again in backward

    def __call__(self, module: nn.Module, args: tuple, out: Any) -> None:
        facts = self.past.here.facts
        while facts is not None and facts.module != id(module):  # of modules that were left by no ordinary exception
            facts = facts.outer
        self.past.here.facts = None if facts is None else facts.outer
        if self.again and checkpoints(self.again) and not torch.compiler.is_compiling():
            tell(out, self.past, facts)


def _given(names: tuple[tuple[str, ...], int], args: tuple, kwargs: dict) -> Any:
    of, place = names
    return args[place] if 0 <= place < len(args) else next((kwargs[n] for n in of if kwargs.get(n) is not None), None)


def _length(cache: Any) -> int | Tensor | None:
    if cache is None:
        return 0
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    return length.clone() if isinstance(length, Tensor) else length  # the cache counts in place


def _read(mask: Any) -> tuple[Tensor | None, str]:
    """(batch, columns), true where a token counts; None where all do. A mask of (query, key) pairs is reduced."""
    if isinstance(mask, dict):  # by the kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None, ""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None, type(mask).__name__
    seen = mask == 0 if mask.dim() == 4 and mask.is_floating_point() else mask != 0
    seen = seen.flatten(1, 2).any(1) if seen.dim() == 4 else seen
    real = type(seen) is Tensor and seen.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask.dim() == 2 and real and bool(seen.all()):  # without waiting for a device, and not of tensors without data
        return None, ""
    return seen, ""


def follow(root: nn.Module) -> None:
    """Tell the tensors of every method that follows its call what that says; take the hooks off where none does."""
    following = []
    for module in root.modules():
        if isinstance(module, SiteTensors) and _follows(module.method):
            following.append(module)
        for hooks, more in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key in [k for k, hook in hooks.items() if isinstance(hook, (_Enter, _Leave))]:
                for table in (hooks, *more):
                    table.pop(key, None)
    past, speaking = Past(), _speaking(root) if following else []
    for module, cache, mask, alone in speaking:
        module.register_forward_pre_hook(_Enter(past, cache, mask, alone), with_kwargs=True)
        module.register_forward_hook(_Leave(past, checkpointed(module)), always_call=True)
    for tensors in following:
        tensors.past = past if speaking else None


def _follows(method: object) -> bool:
    return isinstance(method, HiddenMethod) and method.follows


def _speaking(root: nn.Module) -> list[tuple]:
    """(module, its cache, its mask, whether it has neither though others have) of those around blocks, outermost first.

    Not of what is in lists of blocks, where a cache grows from one to the next.
    """
    found, waiting = {}, [root]
    while waiting:
        module = waiting.pop(0)
        found[id(module)] = module
        waiting += [m for m in module.children() if not isinstance(m, nn.ModuleList) and id(m) not in found]
    every = []
    for module in found.values():
        arguments = list(_arguments(module))
        stack = any(isinstance(m, nn.ModuleList) for m in module.children())
        cache, mask = (_place(arguments, names) for names in (cache_names(module), (MASK,)))
        every.append((module, cache, mask, stack))
    cached = any(stack and cache is not None for _, cache, _, stack in every)
    sounds = {n for m in found.values() for n in _arguments(m) if re.search("cache|past|mems|state", n)}
    never = not any(cache is not None for _, cache, _, _ in every) and not any(map(_sounds_cached, sounds))
    speaking = []
    for module, cache, mask, stack in every:
        alone = cache is None and ((stack and cached) or (never and mask is not None))
        if cache is not None or mask is not None or alone:
            speaking.append((module, cache, mask, alone))
    return speaking


def _sounds_cached(name: str) -> bool:
    return not _NO_CACHES.fullmatch(name) and "hidden_states" not in name


def _place(arguments: list[str], names: Iterable[str]) -> tuple[tuple[str, ...], int] | None:
    of = [n for n in names if n in arguments]
    if not of:
        return None
    own = tuple(dict.fromkeys([*of, *(CACHES if of[0] != MASK else ())]))
    return own, arguments.index(of[0])
