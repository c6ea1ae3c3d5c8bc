"""Writing with a causal LM: greedy or sampled answers, in batches with a KV cache.

    generate(model, tokenizer, ["3+4=?"])                                  # greedy
    generate(model, tokenizer, ["A number: "] * 8, temperature=0.7, seed=1)  # eight samples

A sampled row has a stream of random numbers of its own, `Stream(seed, …, row)`, one number for each of its tokens, and
takes the first token up to which the probabilities, added in the order of the vocabulary, are above the number. So
neither the batch a row is in, nor its place there, nor the other rows decide what it says: only the rounding of logits
does, which batches of other lengths change as they change greedy answers. It is the same on every machine up to that.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.base.ranges import MANY
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.classes import original_class
from addenda.core.modules.wrappers import unwrap
from addenda.core.state.cache_length import as_given, cache_of
from addenda.data.encode import end_ids, prompt_ids
from addenda.data.examples import Chat
from addenda.data.limits import positions
from addenda.models.kinds import check_module, task_of
from addenda.models.machine import device_of

Ended = Callable[[list[int]], bool]  # whether a row that has written these tokens is done


@checked()
def generate(
    model: Any,
    tokenizer,
    prompts: Sequence[str | Chat | Sequence[Mapping]],
    *,
    max_new_tokens: int = 64,
    batch: int = 16,
    chat: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[str]:
    """Write answers, in the order of the prompts, without special tokens, through the chat template.

    prompts: texts, or chats: lists of messages {"role", "content"}, the last one to be answered.
    temperature: None writes the most likely token each time, whatever the folder's generation_config.json asks for;
    else tokens are drawn with probabilities softmax(logits / temperature), top_p: of the fewest most likely ones that
    have this much of it together. seed (0): row i draws from a stream of its own, keyed by the seed and i, so that its
    answer does not depend on what other rows are beside it. Where the model has positions for fewer than max_new_tokens
    behind a prompt, as many are written as fit, with a warning.

    Raises AddendaError for a model that cannot generate, no prompt, an empty one, one without room behind, what is no
    prompt, and top_p or seed without a temperature.
    """
    check_writes(model)
    if temperature is None and (unread := [n for n, v in (("top_p", top_p), ("seed", seed)) if v is not None]):
        raise AddendaError(f"{unread[0]}= is for drawn answers, and these are greedy: give temperature=, such as 1.")
    if not isinstance(prompts, Iterable | Chat):
        raise AddendaError(f"generate takes a list of prompts, got {type(prompts).__name__}. Give [prompt].")
    prompts = [prompts] if isinstance(prompts, str | Chat) else list(prompts)
    empty = [i for i, p in enumerate(prompts) if isinstance(p, str) and not p.strip()]
    if not prompts or empty:
        raise AddendaError(f"generate wants at least one prompt, none of them empty; empty: {empty or 'all'}.")
    ids = [prompt_ids(tokenizer, p, chat) for p in prompts]
    room, longest = positions(model), max(range(len(ids)), key=lambda i: len(ids[i]))
    if room is not None and len(ids[longest]) >= room:
        raise AddendaError(
            f"Prompt {longest} has {len(ids[longest])} tokens, and the model has positions for {room}: there is none "
            "for an answer. Shorten it."
        )
    short = [i for i in range(len(ids)) if room is not None and len(ids[i]) + max_new_tokens > room]
    if short:
        warnings.warn(
            f"The model has positions for {room} tokens, so answers to {len(short)} of {len(ids)} prompts (the first: "
            f"{min(short)}) may have fewer than the {max_new_tokens} new tokens that were asked for.",
            stacklevel=3,
        )
    ends = end_ids(model, tokenizer, chat)
    draw = None
    if temperature is not None:
        numbers = uniform(seed or 0, "generate", range(len(ids)), max_new_tokens)
        draw = Draw(numbers, temperature, 1.0 if top_p is None else top_p)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch": batch, "ends": ends, "draw": draw}
    rows = continuations(model, ids, pad=pad_of(tokenizer, ends), **options)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn. numbers (rows × tokens): in [0, 1], of every row; top_p: 1 leaves out none."""

    numbers: Tensor
    temperature: float
    top_p: float = 1.0

    def of(self, rows: Sequence[int]) -> "Draw":
        return Draw(self.numbers[list(rows)], self.temperature, self.top_p)

    def token(self, logits: Tensor, step: int) -> Tensor:
        """Return the token (rows, int64) drawn from logits (rows × vocabulary) as token `step` of every row.

        Raises AddendaError for logits that are not finite.
        """
        p = F.softmax(logits.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
            out = sorted_p.cumsum(-1) - sorted_p >= self.top_p  # what stands before has enough already
            p = p.masked_fill(torch.zeros_like(out).scatter(-1, order, out), 0.0)
        below = p.cumsum(-1, dtype=torch.float64)
        if not bool(below[:, -1].isfinite().all()):
            raise AddendaError(
                "The model's logits are not finite, so no token can be drawn. Load it in another dtype (float32), and "
                "look at its weights and its adapter."
            )
        number = self.numbers[:, step].to(below).clamp(max=1 - 2.0**-24)  # below 1: it falls on a token that may be
        return torch.searchsorted(below, (number * below[:, -1])[:, None], right=True)[:, 0]


def uniform(seed: int, purpose: str, keys: Sequence[int], tokens: int) -> Tensor:
    """Return numbers in [0, 1], (keys × tokens), each row from the stream of its key alone."""
    return torch.stack([Stream(seed, purpose, str(key)).uniform(tokens) for key in keys])


def check_writes(model: Any) -> None:
    """Raise AddendaError for a model that cannot generate text."""
    check_module(model)
    if not hasattr(model, "generate") or task_of(model) != "causal":
        raise AddendaError(f"{type(model).__name__} cannot generate text; a causal LM can.")


def pad_of(tokenizer: Any, ends: Sequence[int]) -> int:
    """Return the token that fills short rows."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (list(ends) or [0])[0]


@torch.no_grad()
def continuations(
    model: Any,
    ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch: int,
    ends: Sequence[int],
    pad: int,
    draw: Draw | None = None,
    ended: Ended | None = None,
) -> list[list[int]]:
    """Return the tokens that follow each row of token ids, up to one of `ends`, which is left out.

    ended: another end, by all that a row has written; the token that makes it so is the row's last. draw: as tokens are
    drawn, else the most likely ones are taken. Rows of one prompt that are drawn in one batch read it once.
    """
    config = _config()(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=list(ends) or None,
        use_cache=True,
    )  # fmt: skip
    room, order = positions(model), sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    # a row for which the model has too few positions ends where they end, and not where those beside it would
    short = [i for i in order if room is not None and len(ids[i]) + max_new_tokens > room]
    rest, device = order[len(short) :], device_of(model)
    made: list[list[int]] = [[] for _ in ids]
    with training_mode(model, False):
        for rows in [[i] for i in short] + [rest[at : at + batch] for at in range(0, len(rest), batch)]:
            longest = max(len(ids[i]) for i in rows)
            config.max_new_tokens = min(max_new_tokens, (room or MANY) - longest)
            given = torch.tensor([[pad] * (longest - len(ids[i])) + ids[i] for i in rows], device=device)
            mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in rows], device=device)
            hooks: dict[str, Any] = {"stopping_criteria": [_Ends(ended, longest)]} if ended else {}
            if draw is not None:
                hooks["logits_processor"] = [_Drawing(draw.of(rows), longest)]
                hooks |= _read_once(model, [tuple(ids[i]) for i in rows], given, mask)
            found = model.generate(input_ids=given, attention_mask=mask, generation_config=config, **hooks)
            for i, row in zip(rows, found[:, longest:].tolist(), strict=True):
                made[i] = _cut(row, ends, ended)
    return made


@cache
def _config() -> Any:
    """Return the class of a configuration that takes nothing from the model's own: no penalty, beam, ban or cache."""
    from transformers import GenerationConfig

    class Own(GenerationConfig):
        def update(self, *args, **kwargs):
            whole = "transformers_version" in kwargs  # all that another configuration holds, for what is not said here
            return {} if whole else super().update(*args, **kwargs)

    return Own


def _cut(row: list[int], ends: Sequence[int], ended: Ended | None) -> list[int]:
    """Return a row up to its own end, behind which it went on as long as those beside it."""
    stop = next((k for k, t in enumerate(row) if t in ends), len(row))
    if ended is not None:
        stop = next((k for k in range(1, stop) if ended(row[:k])), stop)
    return row[:stop]


@dataclass
class _Drawing:
    """A logits processor that draws, and leaves the drawn token as the only one that can be taken."""

    draw: Draw
    start: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.draw.token(scores, input_ids.shape[1] - self.start)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@dataclass
class _Ends:
    """A stopping criterion, row by row."""

    ended: Ended
    start: int

    def __call__(self, input_ids: Tensor, scores: Any, **_) -> Tensor:
        return torch.tensor([self.ended(row) for row in input_ids[:, self.start :].tolist()], device=input_ids.device)


def _read_once(model: Any, prompts: list[tuple[int, ...]], given: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return a cache in which the prompts of a batch were read, each distinct one once; nothing where that saves none.

    The last token of each is not in it: `generate` reads that.
    """
    distinct = list(dict.fromkeys(prompts))
    if 2 * len(distinct) > len(prompts) or given.shape[1] < 2:
        return {}
    first = torch.tensor([prompts.index(p) for p in distinct], device=given.device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"input_ids": given, "attention_mask": mask, "position_ids": places}
    reads = inspect.signature(original_class(unwrap(model)).forward).parameters
    inputs = {k: t[first, :-1] for k, t in inputs.items() if k in reads}
    cache = cache_of(model(**inputs, use_cache=True, **({"logits_to_keep": 1} if "logits_to_keep" in reads else {})))
    if not hasattr(cache, "batch_select_indices"):
        return {}
    cache.batch_select_indices(torch.tensor([distinct.index(p) for p in prompts], device=given.device))
    return as_given(model, cache)
