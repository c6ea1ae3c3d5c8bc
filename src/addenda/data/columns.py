"""Rows as examples: which column holds what, and what of a row cannot be used."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from addenda.core.base.errors import AddendaError, nearest
from addenda.data.examples import Chat, Data, Labelled, Pair
from addenda.data.labels import LabelKind, Scale, checked, scale_of, short, writable
from addenda.data.rows import Rows, named_rows, rows_of

PAIRS = [
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
]
TEXTS = [
    ("text", "text_pair"),
    ("text", None),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("sentence", None),
]
LABELS = ("label", "labels", "target", "class")


def table(source: Any, split: str) -> tuple[Rows, list[str]]:
    """Return the rows of a source, at least one, and their columns. Raises AddendaError."""
    rows = rows_of(source, split)
    if not rows:
        raise AddendaError(f"{rows.name} holds no row in split {split!r}; at least one example is needed.")
    rows = named_rows(rows)
    return rows, list(dict.fromkeys(str(c) for row in rows for c in row))


def ordered(data: Data, labels: Sequence[str] | None, outputs: int | None = None) -> Data:
    """Return the same data with its classes numbered as a model's outputs are, by name.

    Raises AddendaError for a class that the model does not have.
    """
    names = checked(labels)
    if data.labels is None or data.labels == names or (names is None and outputs in (None, len(data.labels))):
        return data
    values = [e.label for e in data.examples]  # type: ignore[union-attr]
    scale = scale_of(values, "label", names=names, own=data.labels, outputs=outputs, source=data.source)
    examples = tuple(replace(e, label=scale.of(v)) for e, v in zip(data.examples, values, strict=True))  # type: ignore[call-arg]
    return replace(data, examples=examples, labels=scale.names, said=scale.said)


def as_train(train: Data) -> dict[str, Any]:
    """Return the options to read further data as this training data: labels of the same kind, in the same order."""
    if train.form not in ("label", "image"):
        return {}
    return {"labels": train.labels} if train.labels else {"labels": None, "label_kind": "number"}


def check_classes(train: Data) -> None:
    """Raise AddendaError for training data of a single class."""
    if train.labels is not None and len(train.labels) < 2:
        raise AddendaError(
            f"All {len(train)} examples of {train.source} have the label {next(iter(train.labels), '')!r}; a "
            "classifier learns from at least two classes. Give data with others, or labels= with all that there are."
        )


def label_column(columns: list[str], name: str) -> str | None:
    """Return the column of labels by its usual name. Raises AddendaError where there are several."""
    matches = [c for c in LABELS if c in columns]
    if len(matches) > 1:
        raise AddendaError(
            f"{name} has the columns {' and '.join(map(repr, matches))}, and each may be the label. Say which: label=."
        )
    return matches[0] if matches else None


def scale_in(
    rows: Rows, column: str, labels: Sequence[str] | None, outputs: int | None, kind: LabelKind | None
) -> Scale:
    """Return what the labels in a column mean; see `labels`."""
    values = [row.get(column) for row in rows]
    known_names = rows.known.get(column)
    return scale_of(
        values, column, names=labels, own=known_names, outputs=outputs, kind=kind, source=rows.name, place=rows.place
    )


def first_of(columns: list[str], names: Sequence[str]) -> str | None:
    """Return the first of these names that is a column, or None."""
    return next((n for n in names if n in columns), None)


def text_columns(columns: list[str], pair: str | None) -> tuple[str | None, str | None]:
    """Return the columns of a classifier's text and its second text by their usual names; pair: that of the second."""
    matches = ((a, b) for a, b in TEXTS if a in columns and (b is None or b in columns))
    first, second = next(matches, (None, None))
    return first, pair or second


def pair_columns(columns: list[str], question: str | None, answer: str | None) -> tuple[str | None, str | None]:
    """Return the columns of questions and answers: as they are given, else by usual names that go together."""
    if question and answer:
        return question, answer
    matches = ((q, a) for q, a in PAIRS if (question or q) in columns and (answer or a) in columns)
    usual_question, usual_answer = next(matches, (None, None))
    return question or usual_question, answer or usual_answer


def present(columns: list[str], name: str, **wanted: str | None) -> dict[str, str]:
    """Return the wanted columns, all there; `pair` may be None. Raises AddendaError naming all that are not."""
    wanted = {k: v for k, v in wanted.items() if not (k == "pair" and v is None)}
    problems = [f"{k}={v!r}" + nearest(v, columns) if v else f"{k}=" for k, v in wanted.items() if v not in columns]
    if problems:
        usual = "messages, question/answer, prompt/completion or the like"
        usual = f"{next(iter(wanted))} and label" if "label" in wanted else usual
        raise AddendaError(
            f"{name} lacks a column for {', '.join(problems)} (usual names: {usual}). It has the columns "
            f"{', '.join(map(repr, columns)) or 'none'}; name the right ones with {', '.join(f'{k}=' for k in wanted)}."
        )
    return {k: str(v) for k, v in wanted.items()}


def collect(rows: Rows, make: Callable[[dict], Any]) -> tuple:
    """Return make(row) of every row; rows for which it raises ValueError are told together in one AddendaError."""
    items, problems = [], []
    for i, row in enumerate(rows):
        try:
            item = make(row)
            items.append(replace(item, place=rows.place(i)) if hasattr(item, "place") else item)
        except ValueError as error:
            problems.append(f"{rows.place(i)}: {error}".rstrip("."))
    if problems:
        rest = f"; … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AddendaError(
            f"{len(problems)} of {len(rows)} rows of {rows.name} cannot be used: {'; '.join(problems[:5])}{rest}. "
            "Mend or remove these rows."
        )
    return tuple(items)


def _text(row: dict, column: str, empty: bool = False) -> str:
    return text_of(_at(row, column), f"column {column!r}", empty)


def _at(row: dict, column: str) -> Any:
    if column not in row:
        raise ValueError(f"it has no column {column!r}")
    return row[column]


def text_of(value: Any, where: str, empty: bool = False) -> str:
    """Return a text, or a finite number as one. Raises ValueError for all else; for "" too, unless `empty`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**64:
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {short(value)}, a text was expected")
    if not value.strip() and not empty:
        raise ValueError(f"{where} is empty")
    if not writable(value):
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character: {value[:60]!a}")
    return value


def pair_of(row: dict, wanted: dict[str, str]) -> Pair:
    """Return a row's question, with the input that an instruction has, and its answer. Raises ValueError."""
    question = _text(row, wanted["question"])
    if wanted["question"] == "instruction" and row.get("input"):
        question = f"{question}\n\n{_text(row, 'input', empty=True)}"
    return Pair(question, _text(row, wanted["answer"]))


def chat_of(row: dict, column: str) -> Chat:
    """Return the messages in a row's column, the last of them an answer, as a chat. Raises ValueError."""
    turns = _at(row, column)
    turns = list(turns) if isinstance(turns, (list, tuple)) else turns
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r} holds {short(turns)}, a list of messages was expected")
    if not all(isinstance(t, Mapping) and isinstance(t.get("role"), str) for t in turns):
        raise ValueError(f"column {column!r}: every message needs 'role' and 'content', got {short(turns[0])}")
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(f"column {column!r} must end with an assistant's answer, got {turns[-1]['role']!r} last")
    messages, turn_fields = [], {}
    for i, turn in enumerate(turns):
        fields = {str(k): v for k, v in turn.items() if k not in ("role", "content") and not _nothing(v)}
        if (weight := _weight(fields.pop("weight", None), turn["role"], i)) == 0:
            fields["weight"] = weight
        calls = turn["role"] == "assistant" and ("tool_calls" in fields or "function_call" in fields)
        if "content" not in turn and not calls:
            raise ValueError(f"column {column!r}: every message needs 'role' and 'content', got {short(turn)}")
        content = turn.get("content")
        if content is None and calls:
            fields["content"], content = None, ""
        empty = calls or turn["role"] in ("system", "tool")
        messages.append((turn["role"], text_of(content, f"column {column!r}, message {i},", empty)))
        if fields:
            turn_fields[str(i)] = fields
    return Chat(tuple(messages), _beside(row, turn_fields))


def asked(turns: Sequence[Mapping]) -> Chat:
    """Return messages as a chat whose answer is still to be written. Raises ValueError."""
    if turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant":
        raise ValueError("the last message is the assistant's, and one that is to be answered was expected")
    return chat_of({"messages": [*turns, {"role": "assistant", "content": "-"}]}, "messages")


def _beside(row: dict, turns: dict) -> str:
    """Return what a chat holds besides its texts, as JSON. Raises ValueError for what cannot be kept."""
    extras = {k: row[k] for k in ("tools", "documents", "chat_template_kwargs") if not _nothing(row.get(k))}
    if not _nothing(row.get("functions")):
        raise ValueError("column 'functions' would be lost; templates read 'tools'")
    if isinstance(extras.get("tools"), str):
        try:
            extras["tools"] = json.loads(extras["tools"])
        except RecursionError:
            raise ValueError("column 'tools' is nested too deeply") from None
    if not isinstance(extras.get("tools", []), list) or not isinstance(extras.get("chat_template_kwargs", {}), dict):
        raise ValueError("columns 'tools' and 'chat_template_kwargs' must be a list and an object")
    try:
        text = json.dumps(extras | ({"turns": turns} if turns else {}), allow_nan=False) if extras or turns else ""
        if not writable(json.dumps([extras, turns], ensure_ascii=False)):
            raise ValueError("half of a surrogate pair, which is no character")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"what its messages hold besides texts cannot be kept: {error}") from None
    return text


def _weight(value: Any, role: str, i: int) -> int:
    """Return 1 where an answer is learned, else 0."""
    if value is None:
        return 1
    if value not in (0, 1) or isinstance(value, str):
        raise ValueError(f"message {i} has the weight {short(value)}; 0 (not learned) and 1 are possible")
    if role != "assistant" and value == 1:
        raise ValueError(f"message {i}, of the {role}, has weight 1; only the assistant's turns are learned")
    return int(value) if role == "assistant" else 1


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not len(value))


def labelled(rows: Rows, wanted: dict[str, str], scale: Scale) -> Data:
    """Return rows as texts with labels; wanted: the columns of text, label and maybe pair. Raises AddendaError."""

    def make(row: dict) -> Labelled:
        second = _text(row, wanted["pair"]) if "pair" in wanted else None
        return Labelled(_text(row, wanted["text"]), scale.of(_at(row, wanted["label"])), second)

    return Data(collect(rows, make), "label", scale.names, rows.name, scale.said)
