"""The cache length and the padding mask of the running call, for methods that count the places of tokens.

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
    """Return the arguments of a module's forward that are caches, by their name or by their annotated class."""
    arguments = _arguments(module)
    return [n for n, p in arguments.items() if n in CACHES] or [
        n for n, p in arguments.items() if _CLASS.search(str(p.annotation)) and not _NO_CACHES.fullmatch(n)
    ]


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, under whichever of its names; None where there is none."""
    fields = vars(output) if hasattr(output, "__dict__") else {}
    return next((fields[n] for n in CACHES if fields.get(n) is not None), None)


def as_given(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Return a cache as a keyword argument, under the name that a module's forward has for it."""
    return {next(iter(cache_names(module)), CACHES[0]): cache}


def _arguments(module: nn.Module) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
    return {p.name: p for p in parameters}


@dataclass(frozen=True, eq=False)
class Facts:
    """The facts of one call: the length of its cache and its mask.

    length: of every sequence in the cache; a tensor () from caches that count on the device; None: not known.


    mask: (batch, columns), true for tokens and false for padding, the last columns for the tokens that come now; None
    where all count. unread: the class of a mask that cannot be read.
    """

    length: int | Tensor | None = None
    mask: Tensor | None = None
    unread: str = ""
    module: int = 0  # who says so
    outer: "Facts | None" = None  # what held before

    def of(self, activation: Tensor) -> tuple[int | Tensor | None, Tensor | None]:
        """Return (past, mask) of an activation (batch, tokens, …): see `HiddenMethod.change`."""
        length, mask = self.length, self.mask
        if self.unread:
            raise AddendaError(
                f"The attention mask is a {self.unread}, which does not say which tokens are padding, and the change "
                "counts tokens. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        if mask is None or activation.dim() < 3:
            return length, None
        batch, new_tokens = activation.shape[:2]
        if len(mask) not in (1, batch):
            raise AddendaError(
                f"The attention mask is {tuple(mask.shape)}, the change at activations {tuple(activation.shape)}: "
                "it counts the tokens that are no padding, and wants a mask of as many examples."
            )
        mask = mask.expand(batch, -1)
        columns = mask.shape[1]
        if columns < new_tokens:  # the model has made its input longer, at the end
            mask = torch.cat([mask, mask.new_zeros(batch, new_tokens - columns)], 1)
            columns = new_tokens
        if isinstance(length, Tensor):
            if columns == new_tokens:
                return length, mask
            place = (length + torch.arange(new_tokens, device=mask.device)).clamp(max=columns - 1)
            counts = (mask & (torch.arange(columns, device=mask.device) < length)).sum(1, keepdim=True)
            return counts, mask[:, place]
        end = columns if length is None else min(columns, length + new_tokens)
        start = end - new_tokens
        unseen = 0 if length is None else length - start  # what a mask of the newest tokens leaves out
        return mask[:, :start].sum(1, keepdim=True) + unseen, mask[:, start:end]


class _Here(threading.local):
    def __init__(self):
        self.facts: Facts | None = None


class Past:
    """The facts of the running call, in this thread: one object for all hooks and following tensors of a model."""

    def __init__(self):
        self.here = _Here()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.here = _Here()

    def facts(self) -> Facts | None:
        """Return the facts of the running call; in backward, those of the call that is computed again."""
        return self.here.facts if torch.compiler.is_compiling() else used(self, lambda: self.here.facts)


@dataclass(eq=False)
class _Enter:
    """A forward pre-hook that notes a call's facts. cache, mask: names and place of the argument; None without one.

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
    """A forward hook that brings back the facts from before the call."""

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
    keys, place = names
    return args[place] if 0 <= place < len(args) else next((kwargs[n] for n in keys if kwargs.get(n) is not None), None)


def _length(cache: Any) -> int | Tensor | None:
    if cache is None:
        return 0
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    return length.clone() if isinstance(length, Tensor) else length  # the cache counts in place


def _read(mask: Any) -> tuple[Tensor | None, str]:
    """Return (batch, columns), true where a token counts (None where all do), and the class of an unreadable mask."""
    if isinstance(mask, dict):  # by the kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None, ""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None, type(mask).__name__
    counted = mask == 0 if mask.dim() == 4 and mask.is_floating_point() else mask != 0
    counted = counted.flatten(1, 2).any(1) if counted.dim() == 4 else counted
    real = type(counted) is Tensor and counted.device.type == "cpu" and not torch.compiler.is_compiling()
    if (
        mask.dim() == 2 and real and bool(counted.all())
    ):  # without waiting for a device, and not of tensors without data
        return None, ""
    return counted, ""


def follow(root: nn.Module) -> None:
    """Give the running call's facts to the tensors of methods that follow it; remove the hooks where none does."""
    following = []
    for module in root.modules():
        if isinstance(module, SiteTensors) and _follows(module.method):
            following.append(module)
        for hooks, tables in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key in [k for k, hook in hooks.items() if isinstance(hook, (_Enter, _Leave))]:
                for table in (hooks, *tables):
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
    """Return, outermost first, (module, its cache, its mask, whether it has neither though others do) around blocks.

    Not of what is in lists of blocks, where a cache grows from one to the next.
    """
    modules, queue = {}, [root]
    while queue:
        module = queue.pop(0)
        modules[id(module)] = module
        queue += [m for m in module.children() if not isinstance(m, nn.ModuleList) and id(m) not in modules]
    candidates = []
    for module in modules.values():
        arguments = list(_arguments(module))
        stack = any(isinstance(m, nn.ModuleList) for m in module.children())
        cache, mask = (_place(arguments, names) for names in (cache_names(module), (MASK,)))
        candidates.append((module, cache, mask, stack))
    cached = any(stack and cache is not None for _, cache, _, stack in candidates)
    sounds = {n for m in modules.values() for n in _arguments(m) if re.search("cache|past|mems|state", n)}
    never = not any(cache is not None for _, cache, _, _ in candidates) and not any(map(_sounds_cached, sounds))
    speaking = []
    for module, cache, mask, stack in candidates:
        alone = cache is None and ((stack and cached) or (never and mask is not None))
        if cache is not None or mask is not None or alone:
            speaking.append((module, cache, mask, alone))
    return speaking


def _sounds_cached(name: str) -> bool:
    return not _NO_CACHES.fullmatch(name) and "hidden_states" not in name


def _place(arguments: list[str], names: Iterable[str]) -> tuple[tuple[str, ...], int] | None:
    matches = [n for n in names if n in arguments]
    if not matches:
        return None
    keys = tuple(dict.fromkeys([*matches, *(CACHES if matches[0] != MASK else ())]))
    return keys, arguments.index(matches[0])
