"""Examples as token ids: what the model reads, and where the loss looks.

A causal LM's example is a row of segments, each tokenised on its own, so that the prompt has the very tokens that
`generate` starts from. Learned are the assistant's turns, each up to and including its end token; the rest of the row
has the label −100. With a chat template the segments are cut from the rendered chat; without one they are the plain
question, answer and end-of-text token, one after the other. `chats` says where the cuts are.

    ids     <|im_start|> user ⏎ 3 + 4 = ? <|im_end|> ⏎ <|im_start|> assistant ⏎    7    <|im_end|>
    labels       −100  …                                                −100       7    <|im_end|>

Images become pixels elsewhere, in `pixels`; `encode` knows the way.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.data.batches import Collator
from addenda.data.chats import Ending, Segment, ending_of, prompt, refused, segments, special_ids
from addenda.data.columns import asked
from addenda.data.encoded import IGNORE, Encoded, Kind
from addenda.data.examples import Chat, Data, Labelled, Pair
from addenda.data.labels import short
from addenda.data.prepare import Preparation

Overflow = Literal["error", "drop", "truncate", "truncate_second"]


@dataclass(frozen=True)
class Tokens(Encoded):
    """Tokenised examples. ids: token ids; labels: for "causal" a list beside each row, else one number each."""

    unit: ClassVar[str] = "tokens"
    ragged: ClassVar[bool] = True
    ids: list[list[int]]
    labels: list[Any]
    kind: Kind
    pad: int
    types: list[list[int]] | None = None  # token_type_ids, where the tokenizer has them
    names: tuple[str, ...] | None = None  # of the classes
    said: tuple[str, ...] = ()

    def __getitem__(self, i: int) -> dict:
        row = {"input_ids": self.ids[i], "labels": self.labels[i]}
        return row if self.types is None else row | {"token_type_ids": self.types[i]}

    @cached_property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids and labels."""
        digest = hashlib.sha256(self.kind.encode())
        for ids, label in zip(self.ids, self.labels, strict=True):
            digest.update(f"{ids}{label}".encode())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "Tokens":
        types = None if self.types is None else [self.types[i] for i in rows]
        return replace(self, ids=[self.ids[i] for i in rows], labels=[self.labels[i] for i in rows], types=types)

    def filled(self, pad: int) -> "Tokens":
        return replace(self, pad=pad)

    def batch(self, rows: Sequence[int], skip: int = 0) -> dict[str, Tensor]:
        """Return these rows as one batch of a `Collator`. skip: first tokens to leave out, for a causal LM."""
        items = [self[i] for i in rows]
        return Collator(self.pad, self.kind)([{k: v[skip:] for k, v in r.items()} for r in items] if skip else items)


def encode(
    data: Data,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overflow: Overflow = "error",
    chat: bool | None = None,
    skip_corrupt: bool = False,
) -> Encoded:
    """Return the examples as the model takes them: texts by a tokenizer, images by a `Preparation`.

    chat: use the tokenizer's chat template (None: if it has one). max_length: the model's context in tokens, None for
    no limit. overflow: what to do with a longer example: an error, drop it, or cut the prompt from the left (a
    classifier's text as its tokenizer cuts, which leaves [CLS] and [SEP] where they are); an answer is never cut.
    "truncate_second": of a pair of texts cut the second one only, such as the document that answers a query.
    skip_corrupt: leave out images that cannot be decoded.
    Raises AddendaError for examples that do not fit, by index, images that cannot be read, by file, a tokenizer without
    an end token, and what is for texts where images were given.
    """
    if data.form == "image":
        from addenda.data.pixels import decode  # Pillow, an extra

        if not isinstance(tokenizer, Preparation):
            raise AddendaError(
                f"{data.source} holds images, which want a Preparation (addenda.data.prepare), not a "
                f"{type(tokenizer).__name__}."
            )
        if max_length is not None:
            raise AddendaError(
                f"Images have no length in tokens, got max_length={max_length}; image_size is in pixels."
            )
        if overflow != "error" or chat is not None:
            option = f"overflow={overflow!r}" if overflow != "error" else f"chat={chat}"
            raise AddendaError(f"{option} is for texts, and {data.source} holds images. Leave it out.")
        return decode(data, tokenizer, skip_corrupt=skip_corrupt)
    if skip_corrupt:
        raise AddendaError(f"skip_corrupt=True is for images, and {data.source} holds texts. Leave it out.")
    return tokenise(data, tokenizer, max_length=max_length, overflow=overflow, chat=chat)


def tokenise(
    data: Data,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overflow: Overflow = "error",
    chat: bool | None = None,
) -> Tokens:
    """Return the texts of the data as token ids; see `encode`."""
    if data.form == "label" and chat is not None:
        raise AddendaError(f"chat={chat} is for a causal LM, and {data.source} holds texts with labels. Leave it out.")
    if overflow not in get_args(Overflow):
        raise AddendaError(f"overflow must be {', '.join(map(repr, get_args(Overflow)))}, got {overflow!r}.")
    if data.form == "label":
        kind, (ids, labels, types) = ("class" if data.labels else "value"), _texts(data, tokenizer)
        notes = (data.said,) if data.said else ()
    else:
        kind, types = "causal", None
        ids, labels, notes = _turns(data, tokenizer, use_chat(tokenizer, chat))
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    tokens = Tokens(ids, labels, kind, pad, types, data.labels, notes)
    if overflow == "truncate_second" and getattr(next(iter(data.examples), None), "pair", None) is None:
        raise AddendaError(
            f"overflow='truncate_second' cuts the second text of a pair, and the examples of {data.source} are no "
            "pairs of texts. Give overflow='truncate'."
        )
    if max_length is not None and overflow.startswith("truncate") and kind != "causal":
        tokens = _shorter(tokens, data, tokenizer, max_length, second=overflow == "truncate_second")
    return tokens if max_length is None else _fit(tokens, max_length, overflow, data)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise AddendaError for what makes no ids of a text."""
    if not callable(tokenizer) or isinstance(tokenizer, type):
        given = repr(tokenizer)[:80] if isinstance(tokenizer, str) else type(tokenizer).__name__
        raise AddendaError(f"Expected a tokenizer, such as AutoTokenizer.from_pretrained(folder) gives, got {given}.")


def use_chat(tokenizer, chat: bool | None) -> bool:
    """Return whether prompts go through the tokenizer's chat template: as asked, else where it has one.

    Raises AddendaError where it is asked for and there is none, and for what is no tokenizer.
    """
    check_tokenizer(tokenizer)
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has:
        raise AddendaError(
            "chat=True wants a tokenizer with a chat template, and this one has none. Leave chat out for plain text."
        )
    return has if chat is None else chat


def prompt_ids(tokenizer, question: str | Chat | Sequence[Mapping], chat: bool | None = None) -> list[int]:
    """Return the token ids that `generate` starts from: those of a training example, up to the answer.

    question: a text, a `Chat` whose last turn is left out, or messages {"role", "content"}, the last one the user's.
    Raises AddendaError for anything else, and for what the chat template does not take.
    """
    example = _example(question)
    ending = ending_of(tokenizer) if use_chat(tokenizer, chat) else None
    try:
        pieces = prompt(example, tokenizer, ending)
    except ValueError as error:
        raise refused(error) from None
    ids, special = start_ids(tokenizer) if ending is None else [], special_ids(tokenizer)
    for piece, part in zip(
        pieces, tokenizer([p.text for p in pieces], add_special_tokens=False)["input_ids"], strict=True
    ):
        answer, suffix = _end(part, piece, ending, special, tokenizer) if piece.learned else (part, [])
        ids = ids + answer + suffix
    return ids


def _example(question: Any) -> Chat | Pair:
    if isinstance(question, Chat):
        return question
    if isinstance(question, str):
        return Pair(question, "")
    if isinstance(question, list | tuple):
        try:
            return asked(question)
        except ValueError as error:
            raise AddendaError(f"This prompt is no chat: {error}.") from None
    raise AddendaError(
        "A prompt is a text, or a chat as a list of messages {'role', 'content'} of its own, got "
        f"{type(question).__name__} ({short(question)})."
    )


def end_ids(model, tokenizer, chat: bool | None = None) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's and the model's ends of text.

    With a chat template: the one that it ends a turn with, and those that the model's `generation_config` declares."""
    id_sets = []
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        id_sets.append({*eos} if isinstance(eos, (list, tuple)) else {eos})
    if use_chat(tokenizer, chat) and (end := ending_of(tokenizer).token) is not None:
        return sorted(next((ids for ids in id_sets if end in ids), {end}))
    return sorted(t for t in {tokenizer.eos_token_id}.union(*id_sets) if t is not None)


def start_ids(tokenizer) -> list[int]:
    """Return what the tokenizer itself puts before a text (a beginning-of-text token, or nothing)."""
    ids = tokenizer("a")["input_ids"][:1]
    return ids if ids and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


def _turns(data: Data, tokenizer, chat: bool) -> tuple[list[list[int]], list[list[int]], tuple[str, ...]]:
    """Return (ids, labels, what there is to say) of chats and pairs."""
    if tokenizer.eos_token_id is None and not chat:
        raise AddendaError(
            "The tokenizer has neither an end-of-text token nor a chat template, so an answer has no end. "
            "Set tokenizer.eos_token."
        )
    ending = ending_of(tokenizer) if chat else None
    rows: list[list[Segment]] = []
    problems, notes = [], Counter()
    for i, example in enumerate(data.examples):
        try:
            row, note = segments(example, tokenizer, ending)  # type: ignore[arg-type]
        except ValueError as error:
            problems.append(f"{data.place(i)}: {error}")
            continue
        rows.append(row)
        notes.update([note] if note else [])
    if problems:
        raise AddendaError(
            f"{len(problems)} of {len(data)} chats of {data.source} cannot be masked so that only answers are learned: "
            f"{'; '.join(problems[:3])}. Mend these rows, give one assistant's turn per example, or chat=False for "
            "plain text."
        )
    tokens = iter(tokenizer([s.text for row in rows for s in row], add_special_tokens=False)["input_ids"])
    special, start = special_ids(tokenizer), [] if chat else start_ids(tokenizer)
    ids, labels = [], []
    for row in rows:
        row_ids, row_labels = list(start), [IGNORE] * len(start)
        for at, segment in enumerate(row):
            part = list(next(tokens))
            if segment.learned:
                part, suffix = _end(part, segment, ending, special, tokenizer)
                row_ids, row_labels = row_ids + part, row_labels + part
                part = suffix if at < len(row) - 1 else []
            row_ids, row_labels = row_ids + part, row_labels + [IGNORE] * len(part)
        ids.append(row_ids)
        labels.append(row_labels)
    empty = [i for i, row in enumerate(labels) if all(t == IGNORE for t in row[1:]) or row[0] != IGNORE]
    if empty:
        where = _places(data, empty)
        raise AddendaError(f"{len(empty)} examples of {data.source} have no prompt or no answer: {where}.")
    return ids, labels, tuple(f"{n:,} of {len(rows):,} chats: {note}" for note, n in notes.items())


def _end(
    part: list[int], segment: Segment, ending: Ending | None, special: set[int], tokenizer
) -> tuple[list[int], list[int]]:
    """Return (what is learned, what the template puts behind it): up to the template's end, or with an end added.

    Special tokens of the answer's own text end nothing: the template's are counted from the end of the piece.
    """
    places = [i for i, t in enumerate(part) if t in special]
    place = None
    if (
        ending is not None and segment.ends is None
    ):  # no rendering shows what the template adds: special tokens at the end
        text = [bool(tokenizer.decode([t]).strip()) for t in part]
        place = next((i for i in places if all(k in places or not text[k] for k in range(i, len(part)))), None)
    elif ending is not None and segment.ends and len(places) >= segment.ends:
        place = places[-segment.ends]
    if place is not None:
        return part[: place + 1], part[place + 1 :]
    return part + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), []


def _texts(data: Data, tokenizer) -> tuple[list[list[int]], list, list[list[int]] | None]:
    examples: list[Labelled] = list(data.examples)  # type: ignore[arg-type]
    pairs = [e.pair for e in examples]
    if any(p is None for p in pairs) and not all(p is None for p in pairs):
        raise AddendaError(f"Some examples of {data.source} have a second text and some have none.")
    encoding = tokenizer([e.text for e in examples], None if pairs[0] is None else pairs)
    types = encoding.get("token_type_ids")
    ids = [list(row) for row in encoding["input_ids"]]
    return ids, [e.label for e in examples], None if types is None else [list(row) for row in types]


def _shorter(made: Tokens, data: Data, tokenizer: Any, limit: int, second: bool = False) -> Tokens:
    """Return the texts, the too long ones cut by the tokenizer itself: a classifier may read what stands last.

    second: cut only the second text of a pair.
    """
    rows = [i for i, n in enumerate(made.lengths) if n > limit]
    ids, types = list(made.ids), None if made.types is None else list(made.types)
    how = "only_second" if second else "longest_first"
    for i in rows:
        example: Any = data.examples[i]
        if limit <= tokenizer.num_special_tokens_to_add(example.pair is not None):
            raise AddendaError(
                f"{data.source}, {data.place(i)}, cannot be cut to {limit} tokens: the tokenizer's special tokens "
                "leave no room for a text. Raise max_length."
            )
        if second and room_behind(tokenizer, example.text, limit) < 1:
            raise AddendaError(
                f"{data.source}, {data.place(i)}: the first text leaves no room for the second within {limit} tokens, "
                "and overflow='truncate_second' cuts the second only. Shorten the first, raise max_length, or give "
                "overflow='truncate'."
            )
        cut = tokenizer(example.text, example.pair, truncation=how, max_length=limit)
        ids[i] = list(cut["input_ids"])
        if types is not None:
            types[i] = list(cut["token_type_ids"])
    return replace(made, ids=ids, types=types) if rows else made


def room_behind(tokenizer: Any, first: str, limit: int) -> int:
    """Return how many tokens of a second text fit behind a first one and the special tokens; below 0: none do."""
    ids = tokenizer(first, add_special_tokens=False)["input_ids"]
    return limit - len(ids) - tokenizer.num_special_tokens_to_add(True)


def _places(data: Data, rows: Sequence[int], n: int = 8) -> str:
    """Return where examples are, the first n of them: lines of a file, or rows."""
    return ", ".join(data.place(i) for i in rows[:n]) + (", …" if len(rows) > n else "")


def _fit(made: Tokens, limit: int, overflow: Overflow, data: Data) -> Tokens:
    long = [i for i, n in enumerate(made.lengths) if n > limit]
    if not long:
        return made
    source, longest = data.source, max(long, key=lambda i: made.lengths[i])
    answers = [i for i in long if made.kind == "causal" and sum(t != IGNORE for t in made.labels[i]) >= limit]
    if answers and overflow != "drop":
        raise AddendaError(
            f"{len(answers)} of {len(made)} examples of {source} have answers longer than the context of {limit} "
            f"tokens ({_places(data, answers)}). Raise max_length, shorten them, or leave them out with "
            "overflow='drop'."
        )
    if overflow == "error":
        raise AddendaError(
            f"{len(long)} of {len(made)} examples of {source} are longer than {limit} tokens ({_places(data, long)}; "
            f"the longest, {data.place(longest)}, has {made.lengths[longest]}). Raise max_length, or choose "
            "overflow='drop' or 'truncate'."
        )
    if overflow == "drop":
        rows = [i for i, n in enumerate(made.lengths) if n <= limit]
        if not rows:
            raise AddendaError(f"overflow='drop' drops all {len(made)} examples of {source}: all exceed {limit}.")
        return made.take(rows)
    return replace(made, ids=[row[-limit:] for row in made.ids], labels=[row[-limit:] for row in made.labels])
