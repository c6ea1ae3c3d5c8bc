"""Queries with their documents as token ids: only the document is cut, and the separators stay.

    [CLS] query [SEP] document, as much of it as fits [SEP]

With a stride a long document becomes several rows, its passages, each with the whole query; neighbours share so many
tokens. A query that leaves no room for a document is an error, with its name: cut, it would be another query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.data.encode import Tokens
from addenda.data.limits import within
from addenda.train.inputs import context

Named = Callable[[int], tuple[str, str]]  # how a message calls the query and the document of pair i


@dataclass(frozen=True)
class Passages:
    """Pairs as rows. tokens: the rows, each with the label 0. owner: which pair each row is of, in ascending order."""

    tokens: Tokens
    owner: list[int]


def by_row(i: int) -> tuple[str, str]:
    """Call the texts of pair i by its position."""
    return f"the query of pair {i}", f"the document of pair {i}"


def longest(model: nn.Module, tokenizer: Any, max_length: int | None = None) -> int | None:
    """Return how many tokens a pair may have: what was asked for, within what model and tokenizer take; None: any."""
    return within(max_length or context(model, tokenizer), model)


def passages(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    limit: int | None,
    *,
    stride: int | None = None,
    named: Named = by_row,
) -> Passages:
    """Return (query, document) pairs as rows of at most `limit` tokens.

    stride: the tokens that neighbouring passages of a long document share; None: only its beginning is read.
    Raises AddendaError for an empty query or document, a query that leaves no room, a stride as long as what is left
    for a passage, and a tokenizer that has no passages, which those written in Python have not.
    """
    check(pairs, named)
    queries = [q for q, _ in pairs]
    if limit is not None:
        _check_room(tokenizer, queries, limit, stride, named)
    if stride is not None and not getattr(tokenizer, "is_fast", False):
        raise AddendaError(
            f"A {type(tokenizer).__name__} has no passages: they are cut by the tokenizers library. Take the fast "
            "tokenizer of this model, or leave stride out."
        )
    options: dict[str, Any] = {}
    if limit is not None:
        options = {"truncation": "only_second", "max_length": limit}
        options |= {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}
    made = tokenizer(queries, [d for _, d in pairs], **options)
    owner = made.get("overflow_to_sample_mapping") or range(len(pairs))
    ids, types = [list(row) for row in made["input_ids"]], made.get("token_type_ids")
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    rows = None if types is None else [list(row) for row in types]
    return Passages(Tokens(ids, [0.0] * len(ids), "value", pad, rows), [int(i) for i in owner])


def check(pairs: Sequence[tuple[str, str]], named: Named = by_row) -> None:
    """Raise AddendaError for what is no text, and for texts without a letter, all of them by name."""
    empty = []
    for i, pair in enumerate(pairs):
        for text, name in zip(pair, named(i), strict=True):
            if not isinstance(text, str):
                raise AddendaError(f"Expected a text as {name}, got {type(text).__name__}.")
            if not text.strip():
                empty.append(name)
    if empty:
        names = list(dict.fromkeys(empty))
        said = ", ".join(names[:8]) + (f" … and {len(names) - 8} more" if len(names) > 8 else "")
        raise AddendaError(f"A text to rank by or to rank is empty: {said}. Leave it out, or mend the data.")


def _check_room(tokenizer: Any, queries: Sequence[str], limit: int, stride: int | None, named: Named) -> None:
    """Raise AddendaError for queries that leave no room for a document, or none for a step of its passages."""
    first = {q: i for i, q in reversed(list(enumerate(queries)))}
    texts = list(first)
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    extra = tokenizer.num_special_tokens_to_add(True)
    long = [(first[q], n) for q, n in zip(texts, counts, strict=True) if n + extra >= limit]
    if long:
        i, n = min(long)
        name = named(i)[0]
        raise AddendaError(
            f"{name[0].upper()}{name[1:]} has {n} tokens, which with {extra} special ones leaves no room for a "
            f"document within {limit} ({len(long)} of {len(texts)} queries are too long). A query is never cut: "
            "shorten it, or raise max_length as far as the model's positions go."
        )
    if stride is not None and counts and (room := limit - extra - max(counts)) <= stride:
        i = first[texts[counts.index(max(counts))]]
        raise AddendaError(
            f"Passages of a document that share stride={stride} tokens cannot go on where only {room} fit beside "
            f"{named(i)[0]}. Give a smaller stride, or a larger max_length."
        )
