"""Reading data: a path, rows in memory, a data set, images or a task, opened once and as examples of one form."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.data import rows as files
from addenda.data.columns import (
    chat_of,
    collect,
    label_column,
    labelled,
    ordered,
    pair_columns,
    pair_of,
    present,
    scale_in,
    table,
    text_columns,
)
from addenda.data.examples import Data, TaskKind
from addenda.data.labels import LabelKind
from addenda.data.plain import read_texts

PARTS = ("train", "validation", "test")  # a file may be any of them


def of_task(task: Any, split: str, shots: Sequence = ()) -> Data:
    """Return one split of a task with `splits`, as chats under the task's system prompt, each after the shots."""
    from addenda.data.task import chat

    if split not in task.splits:
        raise AddendaError(f"The task {task.name} has no split {split!r}; it has {', '.join(task.splits)}.")
    rows = [{"messages": chat(example, shots)} for example in task.splits[split]]
    return replace(read(rows), source=f"{task.name}[{split}]")


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
    """Return examples: from a path, a `datasets.Dataset`, a frame, a Task, or rows in memory.

    Rows: a dict of columns or of splits, a list of dicts or objects with question and answer.

    task: what will learn from it. question … image: names of columns, where they are not the usual ones. split: the
    part of a source that has several. labels: the names of the classes, in the order of the model's outputs; outputs:
    how many it has, where it does not name them. label_kind: "class" or "number", where labels could be either (see
    `labels`).
    Raises AddendaError for a source that is missing, empty or unreadable, a missing column (with those that there are),
    labels that could mean two things, and rows that cannot be used, by line or index.
    """
    options = {"question": question, "answer": answer, "text": text, "pair": pair, "label": label, "messages": messages,
             "image": image, "label_kind": label_kind}  # fmt: skip
    if label_kind not in (None, *get_args(LabelKind)):
        raise AddendaError(f"label_kind must be 'class' or 'number', got {label_kind!r}.")
    if isinstance(source, Data):
        _check_read(options, (), f"{source.source}, which was read already")
        return ordered(source, labels, outputs)
    if hasattr(source, "splits") and hasattr(source, "metric"):
        _check_read(options, (), f"the task {source.name}, whose columns are known")
        return of_task(source, split)
    if split not in PARTS and isinstance(source, str | Path) and path_of(source, "data").is_file():
        raise AddendaError(f"{source} is one file, which has no part split={split!r}. Leave it out, or name a folder.")
    if task == "image":
        _check_read(options, ("image", "label", "label_kind"), "an image classifier's data")
        from addenda.data.images import read_images

        label_options: dict[str, Any] = {"labels": labels, "outputs": outputs, "label_kind": label_kind}
        return read_images(source, split=split, image=image, label=label, **label_options)
    if task == "masked":
        _check_read(options, ("text",), "plain texts, which a masked LM learns")
        return read_texts(source, split, text)
    rows, columns = table(source, split)
    name = rows.name
    if task == "label":
        _check_read(options, ("text", "pair", "label", "label_kind"), f"{name}, whose texts are for a classifier")
        first, second = (text, pair) if text else text_columns(columns, pair)
        names = present(columns, name, text=first, pair=second, label=label or label_column(columns, name))
        scale = scale_in(rows, names["label"], labels, outputs, label_kind)
        return labelled(rows, names, scale)
    if messages or (not (question or answer) and "messages" in columns):
        column = present(columns, name, messages=messages or "messages")["messages"]
        _check_read(options, ("messages",), f"{name}, whose chats are in the column {column!r}")
        return Data(collect(rows, lambda row: chat_of(row, column)), "chat", source=name)
    _check_read(options, ("question", "answer", "messages"), f"{name}, whose questions and answers are for a causal LM")
    question, answer = pair_columns(columns, question, answer)
    names = present(columns, name, question=question, answer=answer)
    return Data(collect(rows, lambda row: pair_of(row, names)), "pair", source=name)


def _check_read(asked: dict[str, Any], known: Sequence[str], what: str) -> None:
    """Raise AddendaError for options that nothing reads for such data."""
    if leftovers := [f"{k}={v!r}" for k, v in asked.items() if v is not None and k not in known]:
        raise AddendaError(f"{', '.join(leftovers)} cannot be used for {what}. Leave it out.")


def without_columns(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `read` for what was read already: the order of the classes, no columns."""
    return {k: v for k, v in options.items() if k in ("labels", "outputs")}


def splits_of(source: Any, task: TaskKind = "causal") -> list[str]:
    """Return the parts of a folder, by name; nothing for any other source."""
    if task == "image":
        from addenda.data import images

        if splits := images.parts(source):
            return splits
    return files.splits_of(source)
