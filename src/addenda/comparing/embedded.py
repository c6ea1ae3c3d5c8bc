"""The embedded comparisons: tasks that need no file and no account, by the names that stand for them in `data`.

docstrings     a small pretrained encoder (`models.encoders`) says which library a docstring is from: many trials fit in
               a few minutes on any machine
sort-numbers   SmolLM2-135M-Instruct sorts three numbers (`data.task`): a causal LM, some fifty times the work
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.core.base.errors import AddendaError
from addenda.data.task import NAME as TASK
from addenda.models.encoders import ENCODERS

if TYPE_CHECKING:
    from addenda.comparing.subject import Subject

DOCSTRINGS = "docstrings"
ENCODER = "splade-tiny"
SIZES = {"train": 3200, "validation": 400, "test": 3200}

# What `addenda compare` does on docstrings unless told otherwise, and `addenda demo` does first: fixed, so that every
# machine makes the same plan, and none times what pays. Steps, sizes and the middles of searches were chosen on seed
# 100. A search is half as long as a final run: with a quarter, rates win at which an arm hardly moves, as at first a
# change only disturbs the fitted head.
PLAN: dict[str, Any] = {
    "methods": "lora,miss:rank=16,shira,ia3", "budget": "steps=300", "search_steps": 150, "batch": 32, "seeds": 5,
    "rates": 3, "items": 0, "dtype": "float32", "grouped": False,
}  # fmt: skip
VALIDATION = 400
WORKERS = 4  # processes that are begun unasked: each takes some 0.5 GB
MIDDLES = {"lora": 3e-3, "miss:rank=16": 9.5e-4, "shira": 9.5e-3, "ia3": 3.2e-2}


def middles(methods: Iterable[str]) -> dict[str, float]:
    """Return where the search for each method's rate begins on docstrings, for those that are known."""
    return {m: MIDDLES[m] for m in methods if m in MIDDLES}


def task_of(model: str | Path | None, data: str | Path | None) -> str | None:
    """Return the embedded task that is meant, None where model and data are a folder and a file of one's own.

    A file or folder of a task's name is meant only beside a model, since data alone is nothing to compare on.
    Raises AddendaError where one of both is missing, and for a model that the task is not for.
    """
    if model is None and data is None:
        return DOCSTRINGS
    task = str(data) if str(data) in (DOCSTRINGS, TASK) and (model is None or not Path(str(data)).exists()) else None
    if task is None and (model is None or data is None):
        raise AddendaError(
            f"Give model= and data= together; with neither, {ENCODER} is compared on {DOCSTRINGS}, and data='{TASK}'"
            " is for SmolLM2-135M."
        )
    allowed = ENCODERS if task == DOCSTRINGS else ()
    if task and model is not None and str(model) not in allowed:
        which = " or ".join(ENCODERS) if allowed else "no model: it has its own"
        raise AddendaError(f"The embedded task {task} takes {which}; got model={str(model)!r}.")
    return task


def subject_of(
    task: str, model: str | Path | None, tell: Callable[[str], None], dtype: str = "auto", quantize: str | None = None
) -> "Subject":
    """Return the subject of an embedded task; its model is made from an installed package on the first call."""
    if task == TASK:
        from addenda.comparing.subject import embedded

        return embedded(tell, dtype, quantize)
    if quantize:
        raise AddendaError(f"The encoder of {DOCSTRINGS} has a head that is fitted here: leave quantize= out.")
    from addenda.comparing.encoder import on_docstrings

    folder = ENCODERS[str(model or ENCODER)].model_folder(tell)
    return on_docstrings(folder, sizes=SIZES, dtype=dtype, tell=tell)


def threads_of(model: str | Path | None) -> int | None:
    """Return how many threads an encoder is best trained with, None for all: the smallest one's wait for each other."""
    return 1 if model is None or str(model) == ENCODER else None


def workers_of(threads: int | None) -> int:
    """Return how many runs are best made at once: of one thread each, as many as torch has threads, up to `WORKERS`."""
    import torch

    return min(WORKERS, torch.get_num_threads()) if threads == 1 else 1
