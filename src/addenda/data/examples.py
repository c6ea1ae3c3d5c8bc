"""Data as examples: files, folders and lists of dicts become pairs, chats or labelled texts.

| form  | columns, by name                                              | learned by            |
| ----- | ------------------------------------------------------------- | --------------------- |
| chat  | messages: [{"role", "content"}, …], the assistant's turns learned | a causal LM       |
| pair  | question/answer, prompt/completion, instruction(+input)/output    | a causal LM       |
| label | text/label, sentence/label, premise+hypothesis/label              | a classifier      |

Columns with other names are named by the caller. A file is JSON Lines, a JSON list, CSV (with a header) or Parquet; a
folder is one of `datasets.save_to_disk`, or holds `train.jsonl`, `test.csv` and the like. Nothing is downloaded.
Images, which a vision model classifies, are a fourth form: see `images`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from addenda.core.base.errors import AddendaError, nearest
from addenda.data import rows as files
from addenda.data.labels import LabelKind, Scale, checked, scale_of, short, writable
from addenda.data.rows import Rows, named_rows, rows_of

if TYPE_CHECKING:
    from addenda.data.images import Picture

PAIRS = [("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer")]
PAIRS += [("instruction", "output"), ("instruction", "response"), ("input", "output")]
TEXTS = [("text", "text_pair"), ("text", None), ("sentence1", "sentence2"), ("premise", "hypothesis")]
TEXTS += [("sentence", None)]
TaskKind = Literal["causal", "label", "image"]
LABELS = ("label", "labels", "target", "class")


@dataclass(frozen=True)
class Pair:
    """A prompt and the one answer to learn."""

    question: str
    answer: str
    place: str = field(default="", repr=False, compare=False)  # in the source, for messages

    @property
    def key(self) -> str:
        return self.question


@dataclass(frozen=True)
class Chat:
    """(role, content) turns, the last one the assistant's.

    more: what there is besides, as JSON: "turns", by position, what each holds (tool_calls, weight, …), and what
    belongs to the whole chat (tools, documents, chat_template_kwargs).
    """

    messages: tuple[tuple[str, str], ...]
    more: str = field(default="", repr=False)
    place: str = field(default="", repr=False, compare=False)  # in the source, for messages

    @property
    def key(self) -> str:
        said = "\x1e".join(f"{role}\x1f{content}" for role, content in self.messages[:-1])
        if not self.more:
            return said
        more = json.loads(self.more)
        turns = {k: v for k, v in more.pop("turns", {}).items() if int(k) < len(self.messages) - 1}
        return f"{said}\x1e{json.dumps([more, turns])}"


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, and its class (an index into the data's `labels`) or its value."""

    text: str
    label: int | float
    pair: str | None = None
    place: str = field(default="", repr=False, compare=False)  # in the source, for messages

    @property
    def key(self) -> str:
        return self.text if self.pair is None else f"{self.text}\x1e{self.pair}"


@dataclass(frozen=True)
class Data:
    """Examples of one form, in the order of the source. labels: the names of the classes; None for values.

    said: what was understood of the labels, in words.
    """

    examples: "tuple[Pair | Chat | Labelled | Picture, ...]"
    form: Literal["pair", "chat", "label", "image"]
    labels: tuple[str, ...] | None = None
    source: str = "memory"
    said: str = field(default="", repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, i: int) -> str:
        """Where example i is in the source, for messages."""
        return getattr(self.examples[i], "place", "") or f"row {i}"

    @property
    def digest(self) -> str:
        """SHA-256 of the examples and label names: equal data, equal digest, wherever it was stored."""
        made = hashlib.sha256(repr((self.form, self.labels)).encode())
        for example in self.examples:
            made.update(repr(example).encode() + getattr(example, "more", "").encode())
        return made.hexdigest()

    def split(self, fraction: float, seed: int = 0) -> tuple["Data", "Data"]:
        """(rest, held out), by a hash of the prompt or image: the same one is never in both, on any machine.

        fraction: expected share held out, in (0, 1). Raises AddendaError when either part would be empty.
        """
        if not 0 < fraction < 1:
            raise AddendaError(f"The share to hold out must be between 0 and 1, got {fraction}.")
        held = [share(e.key, seed) < fraction for e in self.examples]
        parts = [tuple(e for e, h in zip(self.examples, held, strict=True) if h == want) for want in (False, True)]
        if not all(parts):
            raise AddendaError(
                f"Holding out {fraction:g} of the {len(self)} examples of {self.source} leaves one part empty (equal "
                "ones are held out together). Give more data, another share, or a file for evaluation."
            )
        return replace(self, examples=parts[0]), replace(self, examples=parts[1])


PARTS = ("train", "validation", "test")  # a file may be any of them


def of_task(task: Any, split: str, shots: Sequence = ()) -> Data:
    """One split of a task with `splits`, as chats under the task's system prompt, each after the shots."""
    from addenda.data.task import chat

    if split not in task.splits:
        raise AddendaError(f"The task {task.name} has no split {split!r}; it has {', '.join(task.splits)}.")
    rows = [{"messages": chat(example, shots)} for example in task.splits[split]]
    return replace(read(rows), source=f"{task.name}[{split}]")


def share(key: str, seed: int) -> float:
    """Where in [0, 1) an example falls, by a hash of what it asks."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()[:7], "big") / 2**56


def read(
    source: Any,
    *,
    task: TaskKind = "causal",
    split: str = "train",
    question: str | None = None,
    answer: str | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    messages: str | None = None,
    image: str | None = None,
    labels: Sequence[str] | None = None,
    outputs: int | None = None,
    label_kind: LabelKind | None = None,
) -> Data:
    """Examples from a path, a `datasets.Dataset`, a frame, a dict of columns or of splits, a list of dicts or objects
    with question and answer, or a Task.

    task: what will learn from it. question … image: names of columns, where they are not the usual ones. split: the
    part of a source that has several. labels: the names of the classes, in the order of the model's outputs; outputs:
    how many it has, where it does not name them. label_kind: "class" or "number", where labels could be either (see
    `labels`).
    Raises AddendaError for a source that is missing, empty or unreadable, a missing column (with those that there are),
    labels that could mean two things, and rows that cannot be used, by line or index.
    """
    asked = {"question": question, "answer": answer, "text": text, "pair": pair, "label": label, "messages": messages,
             "image": image, "label_kind": label_kind}  # fmt: skip
    if label_kind not in (None, *get_args(LabelKind)):
        raise AddendaError(f"label_kind must be 'class' or 'number', got {label_kind!r}.")
    if isinstance(source, Data):
        _check_read(asked, (), f"{source.source}, which was read already")
        return ordered(source, labels, outputs)
    if hasattr(source, "splits") and hasattr(source, "metric"):
        _check_read(asked, (), f"the task {source.name}, whose columns are known")
        return of_task(source, split)
    if split not in PARTS and isinstance(source, str | Path) and Path(source).expanduser().is_file():
        raise AddendaError(f"{source} is one file, which has no part split={split!r}. Leave it out, or name a folder.")
    if task == "image":
        _check_read(asked, ("image", "label", "label_kind"), "an image classifier's data")
        from addenda.data.images import read_images

        given: dict[str, Any] = {"labels": labels, "outputs": outputs, "label_kind": label_kind}
        return read_images(source, split=split, image=image, label=label, **given)
    rows, columns = table(source, split)
    name = rows.name
    if task == "label":
        _check_read(asked, ("text", "pair", "label", "label_kind"), f"{name}, whose texts are for a classifier")
        first, second = (text, pair) if text else _texts(columns, pair)
        wanted = present(columns, name, text=first, pair=second, label=label or label_column(columns, name))
        scale = scale_in(rows, wanted["label"], labels, outputs, label_kind)
        return _labelled(rows, wanted, scale)
    if messages or (not (question or answer) and "messages" in columns):
        column = present(columns, name, messages=messages or "messages")["messages"]
        _check_read(asked, ("messages",), f"{name}, whose chats are in the column {column!r}")
        return Data(collect(rows, lambda row: _chat(row, column)), "chat", source=name)
    _check_read(asked, ("question", "answer", "messages"), f"{name}, whose questions and answers are for a causal LM")
    if not (question and answer):
        found = next((p for p in PAIRS if _fits(p, question, answer, columns)), (question, answer))
        question, answer = question or found[0], answer or found[1]
    wanted = present(columns, name, question=question, answer=answer)
    return Data(collect(rows, lambda row: _pair(row, wanted)), "pair", source=name)


def _check_read(asked: dict[str, Any], known: Sequence[str], what: str) -> None:
    """Raises AddendaError for options that nothing reads for such data."""
    if unread := [f"{k}={v!r}" for k, v in asked.items() if v is not None and k not in known]:
        raise AddendaError(f"{', '.join(unread)} cannot be used for {what}. Leave it out.")


def without_columns(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `read` for what was read already: the order of the classes, no columns."""
    return {k: v for k, v in options.items() if k in ("labels", "outputs")}


def table(source: Any, split: str) -> tuple[Rows, list[str]]:
    """The rows of a source, at least one, and their columns. Raises AddendaError."""
    rows = rows_of(source, split)
    if not rows:
        raise AddendaError(f"{rows.name} holds no row in split {split!r}; at least one example is needed.")
    rows = named_rows(rows)
    return rows, list(dict.fromkeys(str(c) for row in rows for c in row))


def ordered(data: Data, labels: Sequence[str] | None, outputs: int | None = None) -> Data:
    """The same data with its classes numbered as a model's outputs are, by name.

    Raises AddendaError for a class that the model does not have.
    """
    names = checked(labels)
    if data.labels is None or data.labels == names or (names is None and outputs in (None, len(data.labels))):
        return data
    values = [e.label for e in data.examples]  # type: ignore[union-attr]
    scale = scale_of(values, "label", names=names, own=data.labels, outputs=outputs, source=data.source)
    found = tuple(replace(e, label=scale.of(v)) for e, v in zip(data.examples, values, strict=True))  # type: ignore[call-arg]
    return replace(data, examples=found, labels=scale.names, said=scale.said)


def as_train(train: Data) -> dict[str, Any]:
    """How further data is read that belongs to this training data: labels of the same kind, in the same order."""
    if train.form not in ("label", "image"):
        return {}
    return {"labels": train.labels} if train.labels else {"labels": None, "label_kind": "number"}


def check_classes(train: Data) -> None:
    """Raises AddendaError for training data of a single class."""
    if train.labels is not None and len(train.labels) < 2:
        raise AddendaError(
            f"All {len(train)} examples of {train.source} have the label {next(iter(train.labels), '')!r}; a "
            "classifier learns from at least two classes. Give data with others, or labels= with all that there are."
        )


def label_column(columns: list[str], name: str) -> str | None:
    """The column of labels by its usual name. Raises AddendaError where there are several."""
    found = [c for c in LABELS if c in columns]
    if len(found) > 1:
        raise AddendaError(
            f"{name} has the columns {' and '.join(map(repr, found))}, and each may be the label. Say which: label=."
        )
    return found[0] if found else None


def scale_in(
    rows: Rows, column: str, labels: Sequence[str] | None, outputs: int | None, kind: LabelKind | None
) -> Scale:
    """What the labels in a column mean; see `labels`."""
    values = [row.get(column) for row in rows]
    own = rows.known.get(column)
    return scale_of(
        values, column, names=labels, own=own, outputs=outputs, kind=kind, source=rows.name, place=rows.place
    )


def splits_of(source: Any, task: TaskKind = "causal") -> list[str]:
    """The parts of a folder, by name; nothing for any other source."""
    if task == "image":
        from addenda.data import images

        if found := images.parts(source):
            return found
    return files.splits_of(source)


def first_of(columns: list[str], names: Sequence[str]) -> str | None:
    return next((n for n in names if n in columns), None)


def _texts(columns: list[str], pair: str | None) -> tuple[str | None, str | None]:
    fitting = ((a, b) for a, b in TEXTS if a in columns and (b is None or b in columns))
    first, second = next(fitting, (None, None))
    return first, pair or second


def _fits(names: tuple[str, str], question: str | None, answer: str | None, columns: list[str]) -> bool:
    q, a = question or names[0], answer or names[1]
    return q in columns and a in columns


def present(columns: list[str], name: str, **wanted: str | None) -> dict[str, str]:
    """The wanted columns, all there; `pair` may be None. Raises AddendaError naming all that are not."""
    wanted = {k: v for k, v in wanted.items() if not (k == "pair" and v is None)}
    missing = [f"{k}={v!r}" + nearest(v, columns) if v else f"{k}=" for k, v in wanted.items() if v not in columns]
    if missing:
        usual = "messages, question/answer, prompt/completion or the like"
        usual = f"{next(iter(wanted))} and label" if "label" in wanted else usual
        raise AddendaError(
            f"{name} lacks a column for {', '.join(missing)} (usual names: {usual}). It has the columns "
            f"{', '.join(map(repr, columns)) or 'none'}; name the right ones with {', '.join(f'{k}=' for k in wanted)}."
        )
    return {k: str(v) for k, v in wanted.items()}


def collect(rows: Rows, make: Callable[[dict], Any]) -> tuple:
    """make(row) of every row; what cannot be used raises ValueError, and all such rows are told together."""
    found, problems = [], []
    for i, row in enumerate(rows):
        try:
            made = make(row)
            found.append(replace(made, place=rows.place(i)) if hasattr(made, "place") else made)
        except ValueError as error:
            problems.append(f"{rows.place(i)}: {error}".rstrip("."))
    if problems:
        more = f"; … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AddendaError(
            f"{len(problems)} of {len(rows)} rows of {rows.name} cannot be used: {'; '.join(problems[:5])}{more}. "
            "Mend or remove these rows."
        )
    return tuple(found)


def _text(row: dict, column: str, empty: bool = False) -> str:
    return text_of(_at(row, column), f"column {column!r}", empty)


def _at(row: dict, column: str) -> Any:
    if column not in row:
        raise ValueError(f"it has no column {column!r}")
    return row[column]


def text_of(value: Any, where: str, empty: bool = False) -> str:
    """A text, or a finite number as one. Raises ValueError for all else, an empty one too where that is no text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**64:
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {short(value)}, a text was expected")
    if not value.strip() and not empty:
        raise ValueError(f"{where} is empty")
    if not writable(value):
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character: {value[:60]!a}")
    return value


def _pair(row: dict, wanted: dict[str, str]) -> Pair:
    question = _text(row, wanted["question"])
    if wanted["question"] == "instruction" and row.get("input"):
        question = f"{question}\n\n{_text(row, 'input', empty=True)}"
    return Pair(question, _text(row, wanted["answer"]))


def _chat(row: dict, column: str) -> Chat:
    turns = _at(row, column)
    turns = list(turns) if isinstance(turns, (list, tuple)) else turns
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r} holds {short(turns)}, a list of messages was expected")
    if not all(isinstance(t, Mapping) and isinstance(t.get("role"), str) for t in turns):
        raise ValueError(f"column {column!r}: every message needs 'role' and 'content', got {short(turns[0])}")
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(f"column {column!r} must end with an assistant's answer, got {turns[-1]['role']!r} last")
    said, besides = [], {}
    for i, turn in enumerate(turns):
        own = {str(k): v for k, v in turn.items() if k not in ("role", "content") and not _nothing(v)}
        if (weight := _weight(own.pop("weight", None), turn["role"], i)) == 0:
            own["weight"] = weight
        calls = turn["role"] == "assistant" and ("tool_calls" in own or "function_call" in own)
        if "content" not in turn and not calls:
            raise ValueError(f"column {column!r}: every message needs 'role' and 'content', got {short(turn)}")
        content = turn.get("content")
        if content is None and calls:
            own["content"], content = None, ""
        empty = calls or turn["role"] in ("system", "tool")
        said.append((turn["role"], text_of(content, f"column {column!r}, message {i},", empty)))
        if own:
            besides[str(i)] = own
    return Chat(tuple(said), _beside(row, besides))


def _beside(row: dict, turns: dict) -> str:
    """What a chat holds besides its texts, as JSON. Raises ValueError for what cannot be kept."""
    more = {k: row[k] for k in ("tools", "documents", "chat_template_kwargs") if not _nothing(row.get(k))}
    if not _nothing(row.get("functions")):
        raise ValueError("column 'functions' would be lost; templates read 'tools'")
    if isinstance(more.get("tools"), str):
        more["tools"] = json.loads(more["tools"])
    if not isinstance(more.get("tools", []), list) or not isinstance(more.get("chat_template_kwargs", {}), dict):
        raise ValueError("columns 'tools' and 'chat_template_kwargs' must be a list and an object")
    try:
        text = json.dumps(more | ({"turns": turns} if turns else {}), allow_nan=False) if more or turns else ""
        if not writable(json.dumps([more, turns], ensure_ascii=False)):
            raise ValueError("half of a surrogate pair, which is no character")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"what its messages hold besides texts cannot be kept: {error}") from None
    return text


def _weight(value: Any, role: str, i: int) -> int:
    """1 where an answer is learned, else 0."""
    if value is None:
        return 1
    if value not in (0, 1) or isinstance(value, str):
        raise ValueError(f"message {i} has the weight {short(value)}; 0 (not learned) and 1 are possible")
    if role != "assistant" and value == 1:
        raise ValueError(f"message {i}, of the {role}, has weight 1; only the assistant's turns are learned")
    return int(value) if role == "assistant" else 1


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not len(value))


def _labelled(rows: Rows, wanted: dict[str, str], scale: Scale) -> Data:
    def make(row: dict) -> Labelled:
        second = _text(row, wanted["pair"]) if "pair" in wanted else None
        return Labelled(_text(row, wanted["text"]), scale.of(_at(row, wanted["label"])), second)

    return Data(collect(rows, make), "label", scale.names, rows.name, scale.said)
