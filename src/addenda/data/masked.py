"""Texts whose words are to be filled in: some tokens are hidden, and the loss looks there (BERT, arXiv:1810.04805).

15 % of a row's tokens are chosen, at least one and never a special one: of them 80 % become `<mask>`, 10 % another
token, 10 % stay. What is chosen depends on nothing but a seed, the step of the run and the row, so that a run that was
killed goes on with the very masks it would have had; texts to judge by have one draw for all runs.

A text is cut into windows of the model's length, each between the tokenizer's special tokens.

The loss runs over the tokens that the texts use (`table`): a model of a hundred languages has 250,000, a language's
texts some 20,000. A label is then a position in the table.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.data.encoded import IGNORE, Encoded, Kind
from addenda.data.examples import Data

Vocabulary = Literal["texts", "all"]
SHARE = 0.15
SHORTEST = 8  # tokens of a text's last window; fewer say little without what stands before
FEW = 200  # texts; fewer are told of
JUDGED = 0  # the seed of masks to judge by, in every run


@dataclass(frozen=True)
class Masked(Encoded):
    """Tokenised texts to be filled in. labels: the tokens themselves (the same lists as ids).

    special: ids that are never hidden. candidates: ids that stand in for another token. table: the ids that the loss
    runs over, sorted; None for all. step: which draw of the masks. places: which row of the data each row is.
    """

    unit: ClassVar[str] = "tokens"
    ragged: ClassVar[bool] = True
    ids: list[list[int]]
    labels: list[Any]
    pad: int
    mask: int
    special: frozenset[int] = field(repr=False)
    candidates: np.ndarray = field(repr=False, compare=False)
    table: np.ndarray | None = field(repr=False, compare=False)
    seed: int
    step: str
    places: tuple[int, ...] = field(repr=False)
    kind: Kind = "masked"
    names: tuple[str, ...] | None = None
    said: tuple[str, ...] = ()

    @cached_property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, the tokens that the loss runs over, and the seed of the masks."""
        digest = hashlib.sha256(f"masked {SHARE} {self.seed} {self.mask}".encode())
        for part in (self.candidates, np.empty(0) if self.table is None else self.table):
            digest.update(part.astype("<i8").tobytes() + b"|")
        for row in self.ids:
            digest.update(np.array(row, "<i8").tobytes() + b"|")
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "Masked":
        chosen = [self.ids[i] for i in rows]
        return replace(self, ids=chosen, labels=chosen, places=tuple(self.places[i] for i in rows))

    def drawn(self, step: int) -> "Masked":
        """Return the same texts with the masks of a run's micro-batch."""
        return replace(self, step=str(step))

    def batch(self, rows: Sequence[int], skip: int = 0) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels (batch × length), and the table (tokens) where there is one."""
        length = max(len(self.ids[i]) for i in rows)
        ids = np.full((len(rows), length), self.pad)
        labels = np.full((len(rows), length), IGNORE)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for at, i in enumerate(rows):
            row = np.array(self.ids[i])
            ids[at, : len(row)], mask[at, : len(row)] = row, 1
            places, tokens = self._hidden(row, self.places[i])
            wanted = row[places]
            labels[at, places] = wanted if self.table is None else np.searchsorted(self.table, wanted)
            ids[at, places] = tokens
        made = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        made["labels"] = torch.from_numpy(labels)
        return made if self.table is None else made | {"table": torch.from_numpy(self.table)}

    def _hidden(self, row: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (the positions that are chosen, what stands there)."""
        free = np.flatnonzero(~np.isin(row, [*self.special]))
        k, stream = max(1, round(SHARE * len(free))), Stream(self.seed, "masks", self.step, str(place))
        chosen = np.sort(free[np.argsort(stream.raw(len(free)), kind="stable")[:k]])
        tenth = stream.raw(k) % np.uint64(10)
        other = self.candidates[(stream.raw(k) % np.uint64(len(self.candidates))).astype(np.int64)]
        return chosen, np.where(tenth < 8, self.mask, np.where(tenth == 8, other, row[chosen]))


def masked(
    train: Data,
    held: Data | None,
    tokenizer: Any,
    *,
    limit: int | None,
    seed: int = 0,
    vocabulary: Vocabulary = "texts",
) -> tuple[Masked, Masked | None]:
    """Return the texts to learn from and those to judge by, as a masked LM takes them.

    limit: tokens of a window, special ones with it; None: no text is cut. seed: of the masks of training. vocabulary:
    "texts" has the loss run over the tokens of both, "all" over the tokenizer's.
    Raises AddendaError for a tokenizer without a mask token, and texts of which no token could be hidden.
    """
    if vocabulary not in get_args(Vocabulary):
        raise AddendaError(f"vocabulary must be 'texts' or 'all', got {vocabulary!r}.")
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise AddendaError(
            "The tokenizer has no mask token, so nothing can be hidden for a masked LM to fill in. Take a model that "
            "was trained so (its tokenizer_config.json names a mask_token), or name the token: tokenizer.mask_token = …"
        )
    special = frozenset(tokenizer.all_special_ids)
    begin, end = _around(tokenizer)
    if limit is not None and limit <= len(begin) + len(end):
        raise AddendaError(
            f"{limit} tokens leave no room beside {len(begin) + len(end)} special ones. Raise max_length."
        )
    parts = [_windows(data, tokenizer, begin, end, limit, special) for data in (train, held) if data is not None]
    used = np.unique(np.concatenate([np.array(row) for rows, _ in parts for row in rows]))
    used = used[~np.isin(used, [*special])]
    every = np.array(sorted(set(range(len(tokenizer))) - special))
    table, candidates = (used, used) if vocabulary == "texts" else (None, every)
    count = len(used) if table is not None else len(every)
    about = f"the loss runs over {count:,} of {len(tokenizer):,} tokens" + (
        ", those of the texts" if table is not None else ""
    )
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    made = [
        Masked(rows, rows, pad, tokenizer.mask_token_id, special, candidates, table, of, step, tuple(range(len(rows))),
               said=(*notes, about))
        for (rows, notes), of, step in zip(parts, (seed, JUDGED), ("first", "judged"), strict=False)
    ]  # fmt: skip
    return made[0], made[1] if len(made) > 1 else None


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and behind a text."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    return list(whole[:at]), list(whole[at + len(alone) :])


def _windows(
    data: Data, tokenizer: Any, begin: list[int], end: list[int], limit: int | None, special: frozenset[int]
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Return (token ids of every window, what there is to say)."""
    texts = [example.key for example in data.examples]
    rows, long, dropped = [], 0, 0
    room = max(map(len, texts)) * 4 + 8 if limit is None else limit - len(begin) - len(end)
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        long += len(ids) > room
        for at in range(0, len(ids), room):
            window = list(ids[at : at + room])
            if at and len(window) < min(SHORTEST, room):
                continue
            if special.issuperset(window):
                dropped += 1
                continue
            rows.append(begin + window + end)
    if not rows:
        raise AddendaError(
            f"{data.source} has {len(texts):,} texts and no token that could be hidden: all are special or unknown to "
            "the tokenizer. Give texts in a language that the model's tokenizer has."
        )
    notes = [f"{long:,} of {len(texts):,} texts are longer than {room:,} tokens, read in windows"] if long else []
    notes += [f"{dropped:,} windows have nothing to hide and are left out"] if dropped else []
    if len(texts) < FEW:
        tokens = sum(map(len, rows))
        notes.append(f"only {len(texts):,} texts of {tokens:,} tokens: a language is learned from thousands of them")
    return rows, tuple(notes)
