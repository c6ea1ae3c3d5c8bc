"""What a comparison is about: one model, loaded once, and the same encoded data for every arm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from addenda.comparing.entries import DataRecord, ModelRecord, TextRecord
from addenda.core.base.errors import AddendaError
from addenda.data.columns import as_train, check_classes
from addenda.data.encode import Tokens, encode, tokenise
from addenda.data.encoded import Encoded
from addenda.data.examples import Data, share
from addenda.data.general import general
from addenda.data.labels import of_head
from addenda.data.limits import padded, within
from addenda.data.read import of_task, read, splits_of
from addenda.data.subsets import Subset
from addenda.models.kinds import task_in
from addenda.models.load import Loaded, config_of, head_in, load_model, name_outputs

SPLITS = ("train", "validation", "test", "ood")
SHOTS = 8  # finished examples before the question, in the control without training


@dataclass(frozen=True)
class Subject:
    """What a comparison is about. controls: further encodings of test and ood for the base ("base 8-shot").

    heads: what every arm trains besides. fresh: they were drawn at random, so the bare base has no answers to judge.
    attention: the implementation that all arms have; None: the faster one on this machine.
    general: windows of a text on which forgetting is measured.
    """

    model: nn.Module
    tokenizer: Any
    splits: dict[str, Encoded]
    about_model: ModelRecord
    about_data: DataRecord
    controls: dict[str, dict[str, Encoded]] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    fresh: bool = False
    attention: str | None = None
    general: Tokens | None = None

    def reading(self, text: str | Path | None) -> "Subject":
        """Return the subject with a general text to measure forgetting on, see `data.general`; None: with none.

        "auto" is none for what is no causal LM. Raises AddendaError for a file then, and for one that does not do.
        """
        causal = self.splits["train"].kind == "causal"
        if not causal and text not in (None, "auto"):
            raise AddendaError(
                "Forgetting is measured on the loss of a causal LM, and this model is none. Leave general= out."
            )
        asked = text is not None and causal and self.tokenizer is not None
        made = general(text, self.tokenizer, self.model, self.splits["train"]) if asked and text else None
        if made is None:
            return replace(self, general=None, about_data=replace(self.about_data, general=None))
        about = TextRecord(
            name=made.name, sha256=made.sha256, python=made.python, windows=len(made.windows),
            length=len(made.windows.ids[0]),
        )  # fmt: skip
        return replace(self, general=made.windows, about_data=replace(self.about_data, general=about))

    def limited(self, items: int | None) -> "Subject":
        """Return the first `items` of the test split, half as many of ood: in an order by hash or the file's."""
        return self if items is None else self.cut({k: most(k, items) for k in self.splits})

    def cut(self, sizes: Mapping[str, int | None]) -> "Subject":
        """Return the first so many of each split that is named, of the controls too. None: all of them."""

        def first(splits: dict[str, Encoded]) -> dict[str, Encoded]:
            return {k: e.first(sizes.get(k) or len(e)) for k, e in splits.items()}

        splits = first(self.splits)
        about = replace(self.about_data, sizes={k: len(v) for k, v in splits.items()})
        controls = {k: first(c) for k, c in self.controls.items()}
        return replace(self, splits=splits, controls=controls, about_data=about)

    @property
    def tested(self) -> dict[str, Encoded]:
        """The splits that final runs and the base are judged on."""
        return {s: self.splits[s] for s in ("test", "ood") if s in self.splits}


def embedded(tell: Callable[[str], None], dtype: str = "auto", quantize: str | None = None) -> Subject:
    """Return the embedded model and task: see `models.embedded` and `data.task`."""
    from addenda.data.task import embedded_task
    from addenda.models.embedded import NAME, model_folder

    loaded = load_model(model_folder(tell), task="causal", dtype=dtype, quantize=quantize)
    task = embedded_task()

    def encoded(split: str, shots=()) -> Encoded:
        tokens = tokenise(of_task(task, split, shots), loaded.tokenizer)
        return _last_turn(tokens) if shots else tokens

    splits = {split: encoded(split) for split in SPLITS}
    shots = task.splits["train"][:SHOTS]
    example = task.splits["test"][0]
    return Subject(
        loaded.model,
        loaded.tokenizer,
        splits,
        _model_record(NAME, loaded),
        DataRecord(
            name=task.name,
            description=task.description,
            sizes={k: len(v) for k, v in splits.items()},
            hashes=dict(task.hashes),
            metric=task.metric,
            example={"question": example.question, "answer": example.answer},
        ),
        {f"base {SHOTS}-shot": {split: encoded(split, shots) for split in ("test", "ood")}},
    )


def _last_turn(tokens: Tokens) -> Tokens:
    """Return tokens of which only the last answer is judged: the shots before it are given, not asked."""
    labels = []
    for row in tokens.labels:
        end = max(i for i, t in enumerate(row) if t != -100)
        first = next(i for i in range(end, -1, -1) if row[i] == -100) + 1
        labels.append([-100] * first + row[first:])
    return replace(tokens, labels=labels)


def from_files(
    model: str | Path,
    data: str | Path,
    *,
    columns: dict | None = None,
    subset: str | None = None,
    image_size: int | None = None,
    skip_corrupt: bool = False,
    items: int | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Return a subject from a transformers folder and a data file or folder, of texts or images.

    Validation and test come from the folder's own splits, else 10 % and 20 % of the questions or images are held out by
    their hash; with a subset (see `data.subsets`) both it and its validation come out of the training split. items:
    images of the test split that are looked at, so that no others are decoded. Raises AddendaError for whatever does
    not fit."""
    folder, columns = Path(model).expanduser(), columns or {}
    task = task_in(config_of(folder, trust_remote_code))
    options: dict[str, Any] = dict(columns)
    names = None
    if task != "causal":
        names, outputs = head_in(folder, trust_remote_code)
        options |= {"labels": of_head(columns.get("labels"), names), "outputs": outputs}
    train, parts = read(data, task=task, **options), {}
    check_classes(train)
    options |= as_train(train)
    known = splits_of(data, task)
    parts = {split: read(data, task=task, split=split, **options) for split in SPLITS[1:] if split in known}
    if "test" not in parts:
        train, parts["test"] = train.split(0.2)
    if subset is not None:
        train, parts["validation"] = Subset.parse(subset).of(train)
    elif "validation" not in parts:
        train, parts["validation"] = train.split(0.1, seed=1)
    if task != "causal" and not train.labels:
        raise AddendaError(f"{data} holds numbers to predict; a comparison counts right answers, so it wants classes.")
    outputs = len(train.labels) if task != "causal" and train.labels else None
    loading: dict[str, Any] = {"dtype": dtype, "image_size": image_size, "quantize": quantize}
    loaded = load_model(folder, task=task, labels=outputs, trust_remote_code=trust_remote_code, **loading)
    if train.labels and not names:
        name_outputs(loaded.model, train.labels)
    whole: dict[str, Data] = {"train": train, **parts}
    asked = {k: _first(d, most(k, items)) if task == "image" else d for k, d in whole.items()}
    limit = max_length if task == "image" else within(max_length, loaded.model)
    reading: dict[str, Any] = {"max_length": limit, "skip_corrupt": skip_corrupt}
    splits = {k: padded(encode(d, loaded.tokenizer, **reading), loaded.model, 2) for k, d in asked.items()}
    about = replace(_in_words(whole, splits, loaded), name=Path(data).name, subset=subset or None)
    return of_splits(loaded, whole, splits, about)


def of_splits(loaded: Loaded, data: dict[str, Data], splits: dict[str, Encoded], about: DataRecord) -> Subject:
    """Return a subject from a loaded model, its data and the same encoded by split (train, validation, test, ood).

    about: what the record says of the data besides what is counted here: a name and a description at least.
    """
    return Subject(
        loaded.model,
        loaded.tokenizer,
        splits,
        _model_record(Path(loaded.source).name, loaded),
        replace(
            about,
            sizes={k: len(v) for k, v in splits.items()},
            hashes={k: d.digest for k, d in data.items()},
            metric="accuracy" if data["train"].labels else "exact match",
        ),
        heads=loaded.heads,
        fresh=bool(loaded.fresh),
    )


def _first(data: Data, n: int | None) -> Data:
    """Return the first n by hash, a fair sample of a source that is ordered by class."""
    return replace(data, examples=tuple(sorted(data.examples, key=lambda e: (share(e.key, 0), e.key))[:n]))


def most(split: str, items: int | None) -> int | None:
    """Return how many examples of a split are judged at most: `items` of test, half of that of ood, all others."""
    return None if items is None else {"test": items, "ood": max(1, items // 2)}.get(split)


def _in_words(data: dict[str, Data], splits: dict[str, Encoded], loaded: Loaded) -> DataRecord:
    """Return what the record says of the data in words: a description, an example of texts, what was left out."""
    train, labels = data["train"], data["train"].labels or ()
    if train.form != "image":
        first = data["test"].examples[0]
        answer = str(getattr(first, "answer", getattr(first, "label", "")))
        text = f"{len(train)} training examples of form {train.form!r}"
        return DataRecord(description=text, example={"question": first.key[:500], "answer": answer})
    few = ", ".join(labels[:12]) + (f", … and {len(labels) - 12} more" if len(labels) > 12 else "")
    text = f"{len(splits['train'])} training images of {len(labels)} classes ({few}), {loaded.tokenizer}."
    skipped = {k: len(e.skipped) for k, e in splits.items() if e.skipped}
    return DataRecord(description=text, prepared=str(loaded.tokenizer), skipped=skipped or None)


def _model_record(name: str, loaded: Loaded) -> ModelRecord:
    """Return what the record says of the model."""
    return ModelRecord(
        name=name,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        dtype=str(next(p for p in loaded.model.parameters() if p.dim() > 1).dtype).removeprefix("torch."),
        note=loaded.note,
        trust_remote_code=loaded.trust_remote_code or None,
        quantize=loaded.quantize or None,
    )
