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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from addenda.core.errors import AddendaError, nearest
from addenda.train import rows as files
from addenda.train.rows import as_dict, rows_of

if TYPE_CHECKING:
    from addenda.train.images import Picture

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

    @property
    def key(self) -> str:
        return self.question


@dataclass(frozen=True)
class Chat:
    """(role, content) turns, the last one the assistant's."""

    messages: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        return "\x1e".join(f"{role}\x1f{content}" for role, content in self.messages[:-1])


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, and its class (an index into the data's `labels`) or its value."""

    text: str
    label: int | float
    pair: str | None = None

    @property
    def key(self) -> str:
        return self.text if self.pair is None else f"{self.text}\x1e{self.pair}"


@dataclass(frozen=True)
class Data:
    """Examples of one form, in the order of the source. labels: the names of the classes; None for values."""

    examples: "tuple[Pair | Chat | Labelled | Picture, ...]"
    form: Literal["pair", "chat", "label", "image"]
    labels: tuple[str, ...] | None = None
    source: str = "memory"

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def digest(self) -> str:
        """SHA-256 of the examples and label names: equal data, equal digest, wherever it was stored."""
        made = hashlib.sha256(repr((self.form, self.labels)).encode())
        for example in self.examples:
            made.update(repr(example).encode())
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


def of_task(task: Any, split: str, shots: Sequence = ()) -> Data:
    """One split of a task with `splits`, as chats under the task's system prompt, each after the shots."""
    from addenda.train.task import chat

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
) -> Data:
    """Examples from a path, a `datasets.Dataset`, a list of dicts or of objects with question and answer, or a Task.

    task: what will learn from it. question … image: names of columns, where they are not the usual ones. split: the
    part of a folder that has several. labels: the names of the classes, in the order of the model's outputs.
    Raises AddendaError for a source that is missing, empty or unreadable, a missing column (with those that there are),
    and rows that cannot be used, by index.
    """
    if isinstance(source, Data):
        return source
    if hasattr(source, "splits") and hasattr(source, "metric"):
        return of_task(source, split)
    if task == "image":
        from addenda.train.images import read_images

        return read_images(source, split=split, image=image, label=label, labels=labels)
    rows, known, name = rows_of(source, split)
    if not rows:
        raise AddendaError(f"{name} holds no row in split {split!r}; at least one example is needed.")
    rows = [as_dict(row, i, name) for i, row in enumerate(rows)]
    columns = list(dict.fromkeys(c for row in rows[:100] for c in row))
    if task == "label":
        first, second = (text, pair) if text else _texts(columns, pair)
        wanted = present(columns, name, text=first, pair=second, label=label or first_of(columns, LABELS))
        return _labelled(rows, wanted, labels or known.get(wanted["label"]), name)
    if messages or (not (question or answer) and "messages" in columns):
        column = present(columns, name, messages=messages or "messages")["messages"]
        return Data(collect(rows, name, lambda row: _chat(row, column)), "chat", source=name)
    if not (question and answer):
        found = next((p for p in PAIRS if _fits(p, question, answer, columns)), (question, answer))
        question, answer = question or found[0], answer or found[1]
    wanted = present(columns, name, question=question, answer=answer)
    return Data(collect(rows, name, lambda row: _pair(row, wanted)), "pair", source=name)


def splits_of(source: Any, task: TaskKind = "causal") -> list[str]:
    """The parts of a folder, by name; nothing for any other source."""
    if task == "image":
        from addenda.train import images

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


def collect(rows: list[dict], name: str, make: Callable[[dict], Any]) -> tuple:
    """make(row) of every row; what cannot be used raises ValueError, and all such rows are told together."""
    found, problems = [], []
    for i, row in enumerate(rows):
        try:
            found.append(make(row))
        except ValueError as error:
            problems.append(f"row {i}: {error}")
    if problems:
        more = f"; … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AddendaError(
            f"{len(problems)} of {len(rows)} rows of {name} cannot be used: {'; '.join(problems[:5])}{more}. Mend or "
            "remove these rows."
        )
    return tuple(found)


def _text(row: dict, column: str, empty: bool = False) -> str:
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {value!r}, a text was expected")
    if not value.strip() and not empty:
        raise ValueError(f"column {column!r} is empty")
    return value


def _pair(row: dict, wanted: dict[str, str]) -> Pair:
    question = _text(row, wanted["question"])
    if wanted["question"] == "instruction" and row.get("input"):
        question = f"{question}\n\n{_text(row, 'input', empty=True)}"
    return Pair(question, _text(row, wanted["answer"]))


def _chat(row: dict, column: str) -> Chat:
    turns = row.get(column)
    turns = list(turns) if isinstance(turns, (list, tuple)) else turns
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r} holds {turns!r}, a list of messages was expected")
    if not all(isinstance(t, Mapping) and {"role", "content"} <= set(t) for t in turns):
        raise ValueError(f"column {column!r}: every message needs 'role' and 'content', got {turns[0]!r}")
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(f"column {column!r} must end with an assistant's answer, got {turns[-1]['role']!r} last")
    return Chat(tuple((str(t["role"]), _text(dict(t), "content", empty=t["role"] == "system")) for t in turns))


def _labelled(rows: list[dict], wanted: dict[str, str], names: Sequence[str] | None, source: str) -> Data:
    names = class_names([row.get(wanted["label"]) for row in rows], names)
    index = None if names is None else {n: i for i, n in enumerate(names)}

    def make(row: dict) -> Labelled:
        value = row.get(wanted["label"])
        second = _text(row, wanted["pair"]) if "pair" in wanted else None
        return Labelled(_text(row, wanted["text"]), class_of(value, index, wanted["label"]), second)

    return Data(collect(rows, source, make), "label", None if names is None else tuple(names), source)


def class_names(values: Sequence, names: Sequence[str] | None = None) -> Sequence[str] | None:
    """The names given; else "0" up to the largest of whole numbers, or the texts in order; None for values."""
    if names is not None:
        return names
    values = [v for v in values if v is not None and str(v).strip()]  # a row without a label is told by `class_of`
    if any(isinstance(v, float) for v in values):
        return None
    if values and all(str(v).isdigit() for v in values):
        return [str(i) for i in range(max(int(v) for v in values) + 1)]
    return sorted(set(map(str, values)))


def class_of(value: Any, index: dict[str, int] | None, column: str) -> int | float:
    if index is None:
        if not isinstance(value, (int, float)) or value != value:
            raise ValueError(f"column {column!r} holds {value!r}, a number was expected")
        return float(value)
    if str(value) in index:
        return index[str(value)]
    if isinstance(value, int) and 0 <= value < len(index):
        return value
    raise ValueError(f"column {column!r} holds {value!r}, expected one of {', '.join(map(repr, list(index)[:8]))}")
