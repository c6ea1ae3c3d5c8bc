"""Where claims are tested: a pretrained model, data, and how long every arm trains.

    docstrings       SPLADE-tiny (4.4 M), which library is a docstring from?      2,400 steps
    kinds            the same encoder: class, function or method?
    two-tasks        adapters of both, alone and both at once (`recipes.shira`)
    few-50, few-two  the same, from 50 or 20 texts a class, other ones for every seed
    docstrings-minilm, garments*, sort-numbers: the fairer subjects, larger and slower

The texts to learn from are the same 4,000 as in the records before; rates are chosen on those that were validation and
test then (2,000). The new test split is of docstrings that nothing has been judged by: up to 850 of each library (there
are only 261 of numpy and 422 of networkx) and up to 2,200 of each kind (1,256 classes), in the order of another hash.
Every item counts alike: 5,783 of libraries and 5,656 of kinds. Weighted so that classes count alike, they would tell as
much as 4,827 and 5,278 do.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from addenda.comparing.encoder import fit_head
from addenda.comparing.entries import DataRecord
from addenda.comparing.run import Watch
from addenda.comparing.subject import Subject, embedded, of_splits
from addenda.data.docstrings import KINDS, LIBRARIES, Row, docstrings, splits
from addenda.data.encode import encode
from addenda.data.examples import Data, Labelled
from addenda.data.idx import FASHION
from addenda.data.read import read
from addenda.data.subsets import Subset
from addenda.models.encoders import ENCODERS
from addenda.models.load import Loaded, load_model, name_outputs
from addenda.models.vision import DINOV2

MOST = {"library": 850, "kind": 2200}  # test items of one class
HALF = 2900  # test items of each task where one adapter learns two
SALT = "a test split of 2026"


@dataclass(frozen=True)
class Setting:
    """A subject by name. make: the subject of a seed; steps, batch: of every final run; first: steps of a search's

    first runs; drawn: every seed has its own examples; fitted: its head is fitted beforehand, to rounding alike on
    every processor; targets: where all arms are put (None: where each method says); small: done before the fairer
    ones; seeds: how many there are likely to be, for the prediction of costs.
    """

    name: str
    make: Callable[[int], Subject]
    steps: int
    first: int
    batch: int = 16
    validation: int = 2000
    rates: int = 5
    drawn: bool = False
    fitted: bool = False
    targets: str | tuple[str, ...] | None = None
    small: bool = True
    seeds: int = 8


# ---- docstrings ------------------------------------------------------------------------------------------------------


def fresh_splits(rows: list[Row], task: str) -> dict[str, Data]:
    """Return train as it was, validation of all that was judged by before, and a test split of what is left."""
    before = {name: splits(rows, name) for name in ("library", "kind")}
    used = {e.key for parts in before.values() for data in parts.values() for e in data.examples}
    left = sorted((row for row in rows if row[0] not in used), key=lambda row: _salted(row[0]))
    tests: dict[str, list[Labelled]] = {}
    for name, column, labels in (("library", 1, LIBRARIES), ("kind", 2, KINDS)):
        tests[name] = []
        for number, label in enumerate(labels):
            own = [row[0] for row in left if row[column] == label][: MOST[name]]
            tests[name] += [Labelled(text, number) for text in own]
        taken = {e.key for e in tests[name]}
        left = [row for row in left if row[0] not in taken]
    known = before[task]
    seen = [*known["validation"].examples, *known["test"].examples]
    found = {"train": known["train"]}
    found["validation"] = replace(known["validation"], examples=tuple(sorted(seen, key=lambda e: _salted(e.key))))
    found["test"] = replace(known["test"], examples=tuple(sorted(tests[task], key=lambda e: _salted(e.key))))
    return found


def _salted(text: str) -> str:
    return hashlib.sha256(f"{SALT}\x1f{text}".encode()).hexdigest()


@lru_cache(maxsize=2)
def _parts(task: str) -> dict[str, Data]:
    return fresh_splits(docstrings(tell=Watch().say), task)


def _with_head(model: str, data: dict[str, Data], name: str, said: str) -> Subject:
    """Return an encoder whose head is fitted to its frozen features of these texts."""
    labels = data["train"].labels or ()
    loaded = load_model(ENCODERS[model].setup(Watch().say), task="label", labels=len(labels), dtype="float32")
    encoded = {k: encode(d, loaded.tokenizer, max_length=64, overflow="truncate") for k, d in data.items()}
    on = of_splits(loaded, data, encoded, DataRecord(name=name, description=f"{said}: {', '.join(labels)}."))
    fit_head(on)
    return replace(on, heads=(), fresh=False)


def whole(model: str, task: str) -> Subject:
    """Return an encoder on all texts of a task."""
    return _with_head(model, _parts(task), f"docstrings-{task}", f"Docstrings, and the {task} of each")


def few(seed: int, per: int, tasks: tuple[str, ...]) -> Subject:
    """Return SPLADE-tiny on a draw of `per` texts a class, of one task or of both at once."""
    parts = {task: _parts(task) for task in tasks}
    if len(tasks) > 1:  # as many items as one task has, half of them of each
        parts = {t: p | {"test": replace(p["test"], examples=p["test"].examples[:HALF])} for t, p in parts.items()}
    data = {part: joined([parts[task][part] for task in tasks]) for part in ("train", "validation", "test")}
    data["train"], _ = Subset(per, seed).of(data["train"])
    name = f"docstrings-{'-'.join(tasks)}-{per}"
    return _with_head("splade-tiny", data, name, f"{per} docstrings of each class, draw {seed}")


def joined(tasks: list[Data]) -> Data:
    """Return several tasks as one: their classes side by side, and before each text a word that says which it is of."""
    if len(tasks) == 1:
        return tasks[0]
    made, first = [], 0
    for word, task in zip(("library", "kind"), tasks, strict=True):
        made += [Labelled(f"{word}: {e.text}", e.label + first) for e in task.examples]  # type: ignore[union-attr]
        first += len(task.labels or ())
    made.sort(key=lambda e: _salted(e.text))
    return Data(tuple(made), "label", (*LIBRARIES, *KINDS), "docstrings")


# ---- larger ones -----------------------------------------------------------------------------------------------------


def garments(seed: int, per: int) -> Subject:
    """Return DINOv2-small with a new head on `per` images a class of Fashion-MNIST, at 56 pixels; the head is trained.

    1,000 others of the training images choose rates; 5,000 of the test images are judged.
    """
    train, data = read(FASHION, task="image"), {}
    train, data["validation"] = train.split(0.05, seed=1)
    data["train"], _ = Subset(per, seed).of(train)
    data["test"] = read(FASHION, task="image", split="test", labels=train.labels)
    for part, most in (("validation", 1000), ("test", 5000)):
        kept = sorted(data[part].examples, key=lambda e: _salted(e.key))[:most]
        data[part] = replace(data[part], examples=tuple(kept))
    labels = train.labels or ()
    loaded = load_model(
        DINOV2.setup(Watch().say), task="image", labels=len(labels), dtype="float32", image_size=56
    )  # fmt: skip
    name_outputs(loaded.model, labels)
    encoded = {k: encode(d, loaded.tokenizer) for k, d in data.items()}
    about = DataRecord(name=f"fashion-mnist-{per}", description=f"{per} images of each class, draw {seed}.")
    return of_splits(_seeded(loaded), data, encoded, about)


def _seeded(loaded: Loaded) -> Loaded:
    """Return the model with a head that is drawn alike in every process."""
    torch.manual_seed(0)
    for head in loaded.heads:
        module = loaded.model.get_submodule(head)
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=0.02)
                torch.nn.init.zeros_(layer.bias)
    return loaded


def numbers(seed: int) -> Subject:
    """Return SmolLM2-135M on the embedded task, in float32 on every processor; 500 answers are judged."""
    on = replace(embedded(Watch().say, "float32"), controls={})
    parts = {k: e for k, e in on.splits.items() if k != "ood"}
    parts["validation"] = parts["validation"].first(200)
    return replace(on, splits=parts).limited(500)


QV = ("*.attention.q_proj", "*.attention.v_proj")

# In this order, the cheapest first by what single steps took; `--cost` says what each takes here.
CHEAPEST = (
    "garments-qv",
    "garments",
    "docstrings-minilm",
    "sort-numbers",
)

SETTINGS = {
    s.name: s
    for s in (
        Setting("docstrings", lambda seed: whole("splade-tiny", "library"), 2400, 600, fitted=True),
        Setting("kinds", lambda seed: whole("splade-tiny", "kind"), 2400, 600, fitted=True),
        Setting("few-50", lambda seed: few(seed, 50, ("library",)), 600, 150, drawn=True, seeds=12),
        Setting("few-two", lambda seed: few(seed, 20, ("library", "kind")), 600, 150, drawn=True, seeds=12),
        Setting(
            "docstrings-minilm",
            lambda seed: whole("minilm", "library"),
            1200,
            300,
            validation=1000,
            fitted=True,
            small=False,
        ),
        Setting("garments", lambda seed: garments(0, 100), 400, 100, validation=1000, small=False),
        Setting("garments-qv", lambda seed: garments(0, 100), 400, 100, validation=1000, targets=QV, small=False),
        Setting("sort-numbers", numbers, 200, 50, batch=8, validation=200, small=False, seeds=5),
    )
}
