"""A teacher's answers: written once, greedily, and kept on disk, so that no teacher runs a second time.

    labels = label(teacher, tokenizer, ["Sort ascending: 3 1 2", …])     # the teacher with its adapter, as it acts now
    labels.answers                                                       # "1 2 3", …
    label(teacher, tokenizer, …).kept == 1.0                             # the same call again: nothing was computed

What is kept is found by the hash of everything that decides it: the base's weights, the adapters that act, the
tokenizer and its template, the prompts, the settings, and the versions that compute. Prompts are answered in pieces of
four batches, each kept as soon as it is there: a run that was killed goes on with the next one, in the same bits.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addenda.core.adapter.handle import adapters
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.cache import cache_folder, trim
from addenda.core.file.identity import base_of, digest, versions
from addenda.core.file.states import keep, kept
from addenda.core.file.tokenizer import mark
from addenda.core.file.trained_on import content_hash
from addenda.core.state.state import find_state
from addenda.data.encode import end_ids, prompt_ids
from addenda.data.examples import Chat, Data, Pair
from addenda.models.machine import device_of
from addenda.train.generate import check_writes, continuations, pad_of
from addenda.transferring.question import context_of

ROOM = 256 << 20  # bytes of the folder for what is kept
PIECE = 4  # batches that are kept together


@dataclass(frozen=True)
class Labels:
    """Prompts, and a teacher's answer to each. whole: whether the answer came to its end within the tokens it may have.

    kept: the share that was not computed now; tokens: read and written now; seconds: of now.
    """

    prompts: tuple[str | Chat, ...]
    answers: tuple[str, ...]
    whole: tuple[bool, ...]
    kept: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.prompts)

    def data(self) -> Data:
        """Return what a student learns: the prompts whose answers came to their end, with these.

        Raises AddendaError where none did.
        """
        pairs = [(p, a) for p, a, w in zip(self.prompts, self.answers, self.whole, strict=True) if w]
        if not pairs:
            raise AddendaError(
                f"None of the teacher's {len(self)} answers came to its end, and a student would learn never to stop. "
                "Raise max_new_tokens=."
            )
        chats = [p for p, _ in pairs if isinstance(p, Chat)]
        if chats and len(chats) < len(pairs):
            raise AddendaError(f"{len(chats)} of {len(pairs)} prompts are chats and the others texts. Give one kind.")
        made = tuple(
            Chat((*p.messages[:-1], ("assistant", a)), p.more) if isinstance(p, Chat) else Pair(p, a) for p, a in pairs
        )
        return Data(made, "chat" if chats else "pair", source="the teacher's answers")


@checked()
def label(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Chat],
    *,
    max_new_tokens: int = 64,
    batch: int = 16,
    chat: bool | None = None,
    folder: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Labels:
    """Return the greedy answers of a model, as it acts now, to prompts; those that were kept are not computed again.

    folder: where they are kept, `labels` in addenda's folder for caches unless said. Nothing is kept of a model that a
    `with` block has given other adapters than its own, which no hash would know. A chat ends with an empty answer.
    Raises AddendaError for a model that cannot write, no prompt, an empty one, one that leaves the model's context no
    room for max_new_tokens, and a tokenizer without an end.
    """
    began = time.perf_counter()
    check_writes(model)
    if not isinstance(prompts, Iterable):
        raise AddendaError(f"label takes a list of prompts, got {type(prompts).__name__}. Give [prompt].")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    empty = [i for i, p in enumerate(prompts) if isinstance(p, str) and not p.strip()]
    if not prompts or empty:
        raise AddendaError(f"label wants at least one prompt, none of them empty; empty: {empty[:8] or 'all'}.")
    ends = end_ids(model, tokenizer, chat)
    check_end(ends)
    ids = [prompt_ids(tokenizer, p, chat) for p in prompts]
    limit, longest = context_of(model), max(range(len(ids)), key=lambda i: len(ids[i]))
    if limit is not None and len(ids[longest]) + max_new_tokens > limit:
        raise AddendaError(
            f"Prompt {longest} has {len(ids[longest]):,} tokens, and {max_new_tokens:,} more do not fit in the "
            f"{limit:,} of the teacher's context. Leave it out, or lower max_new_tokens=."
        )
    place = (cache_folder() / "labels") if folder is None else Path(folder)
    whose = teacher_hash(model, tokenizer, max_new_tokens=max_new_tokens, batch=batch, ends=ends)
    rows: list[list[int]] = []
    found = tokens = 0
    for at in range(0, len(ids), PIECE * batch):
        piece = ids[at : at + PIECE * batch]
        file = None if whose is None else place / f"{digest([whose, piece])}.safetensors"
        known = None if file is None else kept(file, functools.partial(_are_rows, n=len(piece)))
        if known is None:
            made = continuations(
                model, piece, max_new_tokens=max_new_tokens, batch=batch, ends=ends, pad=pad_of(tokenizer, ends)
            )
            tokens += sum(map(len, piece)) + sum(map(len, made))
            if file is not None:
                keep(file, {"rows": made}, "teacher's answers")
        else:
            made, found = known["rows"], found + len(piece)
        rows += made
        if say is not None:
            say(f"{len(rows):,} of {len(ids):,} answers, {found:,} of them kept from before")
    if folder is None:
        trim(place, ROOM)
    answers = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    whole = tuple(len(row) < max_new_tokens for row in rows)
    return Labels(tuple(prompts), answers, whole, found / len(ids), tokens, time.perf_counter() - began)


def check_end(ends: Sequence[int]) -> None:
    """Raise AddendaError where nothing ends an answer."""
    if not ends:
        raise AddendaError(
            "The tokenizer has no token that ends an answer, and neither has the model's configuration, so an answer "
            "would never end. Set tokenizer.eos_token."
        )


def teacher_hash(model: Any, tokenizer: Any, **settings) -> str | None:
    """Return the hash of everything that decides what a model answers, or None where adapters act that it cannot name.

    Two models of one hash write the same, on one kind of machine.
    """
    host = find_state(model)
    block = None if host is None else host.state.arrangement
    if block is not None and block.names:
        return None
    acting = () if host is None or block is not None else host.state.active  # in a block without names none acts
    held = {} if host is None else adapters(model)
    return digest({
        "base": base_of(model), "adapters": [content_hash(held[name]) for name in acting],
        "merged": bool(host and host.state.merged), "tokenizer": mark(tokenizer).sha256,
        "template": getattr(tokenizer, "chat_template", None), "device": device_of(model).type,
        "versions": versions(), **settings,
    })  # fmt: skip


def _are_rows(state: Any, n: int) -> bool:
    rows = state["rows"]
    return len(rows) == n and all(isinstance(row, list) and all(type(t) is int for t in row) for row in rows)
