"""What a comparison is about: one model, loaded once, and the same encoded data for every arm."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.errors import AddendaError
from addenda.train.data import Data, of_task, read
from addenda.train.encode import Encoded, encode
from addenda.train.load import Loaded, config_of, label_names, load_model, task_in

SPLITS = ("train", "validation", "test", "ood")
SHOTS = 8  # finished examples before the question, in the control without training


@dataclass(frozen=True)
class Subject:
    """controls: further encodings of test and ood for the bare base, by name ("base 8-shot")."""

    model: nn.Module
    tokenizer: Any
    splits: dict[str, Encoded]
    about_model: dict
    about_data: dict
    controls: dict[str, dict[str, Encoded]] = field(default_factory=dict)
    heads: tuple[str, ...] = ()

    def limited(self, items: int | None) -> "Subject":
        """The first `items` of the test split, half as many of ood: their order is that of a hash or of the file."""
        if items is None:
            return self
        most = {"test": items, "ood": max(1, items // 2)}

        def cut(splits: dict[str, Encoded]) -> dict[str, Encoded]:
            return {k: e.first(most.get(k, len(e))) for k, e in splits.items()}

        splits = cut(self.splits)
        about = self.about_data | {"sizes": {k: len(v) for k, v in splits.items()}}
        controls = {k: cut(c) for k, c in self.controls.items()}
        return replace(self, splits=splits, controls=controls, about_data=about)

    @property
    def tested(self) -> dict[str, Encoded]:
        """The splits that final runs and the base are judged on."""
        return {s: self.splits[s] for s in ("test", "ood") if s in self.splits}


def embedded(tell: Callable[[str], None], dtype: str = "auto") -> Subject:
    """The embedded model and task: see `train.embedded` and `train.task`."""
    from addenda.train.embedded import NAME, model_folder
    from addenda.train.task import embedded_task

    loaded, task = load_model(model_folder(tell), task="causal", dtype=dtype), embedded_task()

    def encoded(split: str, shots=()) -> Encoded:
        made = encode(of_task(task, split, shots), loaded.tokenizer)
        return _last_turn(made) if shots else made

    splits = {split: encoded(split) for split in SPLITS}
    shots = task.splits["train"][:SHOTS]
    example = task.splits["test"][0]
    return Subject(
        loaded.model,
        loaded.tokenizer,
        splits,
        {"name": NAME, "parameters": _count(loaded.model), "dtype": _dtype(loaded.model), "note": loaded.note},
        {
            "name": task.name,
            "description": task.description,
            "sizes": {k: len(v) for k, v in splits.items()},
            "hashes": dict(task.hashes),
            "metric": task.metric,
            "example": {"question": example.question, "answer": example.answer},
        },
        {f"base {SHOTS}-shot": {split: encoded(split, shots) for split in ("test", "ood")}},
    )


def _last_turn(made: Encoded) -> Encoded:
    """Judge the last answer only: the shots before it are given, not asked."""
    labels = []
    for row in made.labels:
        end = max(i for i, t in enumerate(row) if t != -100)
        first = next(i for i in range(end, -1, -1) if row[i] == -100) + 1
        labels.append([-100] * first + row[first:])
    return replace(made, labels=labels)


def from_files(
    model: str | Path,
    data: str | Path,
    *,
    columns: dict | None = None,
    dtype: str = "auto",
    max_length: int | None = None,
) -> Subject:
    """A transformers folder and a data file or folder. Validation and test come from the folder's own splits, else
    10 % and 20 % of the questions are held out by their hash. Raises AddendaError for whatever does not fit."""
    folder, columns = Path(model).expanduser(), columns or {}
    task = task_in(config_of(folder))
    names = label_names(folder) if task == "label" else None
    options: dict[str, Any] = columns | ({"labels": names} if names else {})
    train, parts = read(data, task=task, **options), {}
    options |= {"labels": train.labels} if train.labels else {}
    for split in SPLITS[1:]:
        if Path(data).is_dir():
            try:
                parts[split] = read(data, task=task, split=split, **options)
            except AddendaError:
                continue
    if "test" not in parts:
        train, parts["test"] = train.split(0.2)
    if "validation" not in parts:
        train, parts["validation"] = train.split(0.1, seed=1)
    outputs = len(train.labels) if train.labels else 1
    loaded = load_model(folder, task=task, labels=outputs if task == "label" else None, dtype=dtype)
    about = f"{len(train)} training examples of form {train.form!r}"
    return of_data(loaded, {"train": train, **parts}, Path(data).name, about, max_length=max_length)


def of_data(
    loaded: Loaded, parts: dict[str, Data], name: str, description: str, *, example: bool = True, **encoding
) -> Subject:
    """A loaded model, and its data by split (train, validation and test, perhaps ood).

    example: record one test item. encoding: options of `train.encode.encode`. Raises AddendaError for values to
    predict, and for data that the model cannot read.
    """
    train, first = parts["train"], parts["test"].examples[0]
    if train.form == "label" and not train.labels:
        raise AddendaError(f"{name} holds numbers to predict; a comparison counts right answers, so it wants classes.")
    splits = {k: encode(d, loaded.tokenizer, **encoding) for k, d in parts.items()}
    folder = Path(loaded.source).name
    shown = {"question": first.key[:500], "answer": str(getattr(first, "answer", getattr(first, "label", "")))}
    return Subject(
        loaded.model,
        loaded.tokenizer,
        splits,
        {"name": folder, "parameters": _count(loaded.model), "dtype": _dtype(loaded.model), "note": loaded.note},
        {
            "name": name,
            "description": description,
            "sizes": {k: len(v) for k, v in splits.items()},
            "hashes": {k: d.digest for k, d in parts.items()},
            "metric": "accuracy" if train.form == "label" else "exact match",
            **({"example": shown} if example else {}),
        },
        heads=loaded.heads,
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dtype(model: nn.Module) -> str:
    return str(next(p for p in model.parameters() if p.dim() > 1).dtype).removeprefix("torch.")
