"""The question that a discriminator is asked of a text, whether it is one of a task's, and the two tokens that answer.

    wording = Wording.of(tokenizer, "sort-numbers")
    wording.ids(tokenizer, "Sort ascending: 3 1 2")   # the prompt; what follows it is one token, yes or no

    Sort ascending: 3 1 2 ⏎ Is the above question from the sort-numbers dataset? ‖ yes

With a chat template the first two lines are the user's turn, and the answer is the first token of the model's; without
one the answer follows the question mark, behind a space. The loss looks at this one place, and at these two tokens
only: what else the model might have said is no part of it. (Trans-LoRA, arXiv:2405.17258, asks so.)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.data.encode import prompt_ids, use_chat
from addenda.data.encoded import IGNORE, Encoded, Kind
from addenda.data.limits import within

YES, NO = 0, 1  # places in the table of the two tokens
QUESTION = "Is the above question from the {} dataset?"


@dataclass(frozen=True)
class Wording:
    """How a text is asked about. name: of the task; chat: by the template; answers: the texts of the two tokens."""

    name: str
    chat: bool
    answers: tuple[str, str]
    tokens: tuple[int, int]  # of yes and of no

    @classmethod
    def of(
        cls, tokenizer: Any, name: str, *, chat: bool | None = None, answers: Sequence[str] = ("yes", "no")
    ) -> "Wording":
        """Return the wording for a tokenizer. chat: None where it has a template. answers: the two words.

        Raises AddendaError for a name that is empty or has several lines, and for words that are not one token each.
        """
        if not isinstance(name, str) or not name.strip() or len(name.splitlines()) != 1:
            raise AddendaError(f"The name of the task stands in a sentence: one line of text, got {name!r}.")
        if isinstance(answers, str) or len(answers) != 2 or not all(isinstance(a, str) and a.strip() for a in answers):
            raise AddendaError(f"answers= are two words, for yes and for no, got {answers!r}.")
        by_template = use_chat(tokenizer, chat)
        bare = [a.strip() for a in answers]
        spaced = [f" {a}" for a in bare]
        told = []
        for words in (bare, spaced) if by_template else (spaced, bare):
            ids = [list(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
            whole = all(len(row) == 1 and row[0] != tokenizer.unk_token_id for row in ids)
            if whole and ids[0] != ids[1]:
                return cls(name.strip(), by_template, (words[0], words[1]), (ids[0][0], ids[1][0]))
            told += [f"{word!r} is {_said(row, tokenizer)}" for word, row in zip(words, ids, strict=True)]
        raise AddendaError(
            f"The discriminator compares one token for yes with one for no, and for this tokenizer {', '.join(told)}. "
            "Give two other words that are one token each: answers=['true', 'false']."
        )

    def ids(self, tokenizer: Any, text: str) -> list[int]:
        """Return the token ids of the prompt, up to the answer."""
        return prompt_ids(tokenizer, f"{text}\n{QUESTION.format(self.name)}", self.chat)


def _said(row: list[int], tokenizer: Any) -> str:
    if len(row) == 1 and row[0] == tokenizer.unk_token_id:
        return "unknown"
    return f"{len(row)} tokens" if len(row) != 1 else f"token {row[0]}"


@dataclass(frozen=True)
class Asked(Encoded):
    """Texts under the question, as token ids. labels: `YES` or `NO` of each; table: the ids of the two tokens.

    Its kind is "masked": a loss at the places of the labels themselves, over the tokens of a table.
    """

    unit: ClassVar[str] = "tokens"
    ragged: ClassVar[bool] = True
    ids: list[list[int]]
    labels: list[Any]
    table: tuple[int, int]
    pad: int
    kind: Kind = "masked"
    names: tuple[str, ...] | None = None
    said: tuple[str, ...] = field(default=())

    @cached_property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, labels and the two tokens."""
        return hashlib.sha256(repr((self.ids, self.labels, self.table)).encode()).hexdigest()

    def take(self, rows: Sequence[int]) -> "Asked":
        return replace(self, ids=[self.ids[i] for i in rows], labels=[self.labels[i] for i in rows])

    def batch(self, rows: Sequence[int], skip: int = 0) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels (batch × length), padded on the right, and the table (2)."""
        cut = [self.ids[i][skip:] for i in rows]
        length = max(map(len, cut))
        labels = torch.full((len(cut), length), IGNORE)
        for at, (row, i) in enumerate(zip(cut, rows, strict=True)):
            labels[at, len(row) - 1] = self.labels[i]
        lengths = torch.tensor([len(row) for row in cut])
        return {
            "input_ids": torch.tensor([row + [self.pad] * (length - len(row)) for row in cut]),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
            "labels": labels,
            "table": torch.tensor(self.table),
        }


def asked(
    model: nn.Module, tokenizer: Any, wording: Wording, texts: Sequence[str], labels: Sequence[int] | None = None
) -> Asked:
    """Return texts under the question. labels: of each, `YES` where there are none.

    Raises AddendaError for an empty text, and one that does not fit the model's context with the question behind it.
    """
    if empty := [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise AddendaError(f"{len(empty)} of {len(texts)} texts are empty or no text, the first at {empty[0]}.")
    ids = [wording.ids(tokenizer, text) for text in texts]
    limit = context_of(model)
    if limit is not None and (long := [i for i, row in enumerate(ids) if len(row) > limit]):
        raise AddendaError(
            f"{len(long)} of {len(texts)} texts have more than the {limit:,} tokens of the model's context with the "
            f"question behind them: the first, at {long[0]}, has {len(ids[long[0]]):,}. Leave them out or shorten them."
        )
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return Asked(ids, [YES] * len(ids) if labels is None else list(labels), wording.tokens, pad)


def context_of(model: nn.Module) -> int | None:
    """Return how many tokens a model was made to read at once; None where it does not say."""
    declared = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return within(declared if isinstance(declared, int) and declared > 0 else None, model)
