"""Judging a model: teacher-forced exact match or accuracy, item by item."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.arguments import checked, names_of
from addenda.core.base.errors import AddendaError
from addenda.core.base.ranges import MANY, Range
from addenda.core.disk.access import path_of
from addenda.core.modules.borrow import training_mode
from addenda.core.state.cache_length import as_given, cache_of
from addenda.data.encode import Overflow, encode
from addenda.data.encoded import Encoded
from addenda.data.labels import head_of, of_head
from addenda.data.limits import padded, within
from addenda.data.masked import Masked
from addenda.data.read import read
from addenda.models.kinds import check_module, check_reads, task_of
from addenda.models.machine import device_of
from addenda.train.loss import score


@dataclass(frozen=True)
class Evaluation:
    """What judging found. items: 1 right, 0 wrong, by example (empty for values); loss: mean over labels, in nats."""

    items: list[int]
    accuracy: float | None
    loss: float
    losses: list[float]  # of each example, mean over its labels
    seconds: float
    tokens: int  # read; images, where `unit` says so
    unit: str = "tokens"
    skipped: tuple[str, ...] = ()  # corrupt images that were left out, where that was asked for
    said: tuple[str, ...] = ()  # what was understood of the data

    def __str__(self) -> str:
        right = f"{sum(self.items)} of {len(self.items)} right ({self.accuracy:.1%}), " if self.items else ""
        return f"{right}loss {self.loss:.4f}, {self.tokens / max(self.seconds, 1e-9):,.0f} {self.unit}/s"


@checked(also=names_of(read, without=("task",)), special={"prefix": Range(0, MANY, whole=True)})
@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer=None,
    examples: Any = None,
    *,
    batch: int = 32,
    max_length: int | None = None,
    overflow: Overflow = "error",
    chat: bool | None = None,
    prefix: int = 0,
    skip_corrupt: bool = False,
    **columns,
) -> Evaluation:
    """Return loss and greedy correctness of every example, in evaluation mode; draw no random number.

    A causal LM is right when the most likely token is the right one at every token of the answer and at its end token:
    exactly when greedy `generate` from the same prompt would write that answer. tokenizer: for an image model its
    `Preparation`. examples: Encoded, or what `data.read` takes, with its options as columns. prefix: how many first
    tokens all examples of a causal LM share; they are read once and kept as a cache, which changes results by rounding
    only. skip_corrupt: leave out images that cannot be decoded, and name them. A classifier's labels are compared by
    name with its outputs: the names are in the adapter's file, else in the model's configuration.
    Raises AddendaError for examples that do not fit, and labels that the model does not have.
    """
    check_module(model, "masked" if isinstance(examples, Masked) else None)
    check_reads(model)
    if isinstance(examples, Encoded):
        if examples.names:
            of_head(examples.names, head_of(model)[0])
        asked = {"max_length": max_length, "chat": chat, "skip_corrupt": skip_corrupt or None, **columns}
        if given := [k for k, v in asked.items() if v is not None] + ["overflow"] * (overflow != "error"):
            raise AddendaError(f"The examples are Encoded already, so {given[0]}= comes too late: give it to encode().")
    else:
        if tokenizer is None:
            raise AddendaError(
                "evaluate wants a tokenizer (for images a Preparation) for examples that are not Encoded."
            )
        options: dict[str, Any] = {"task": task_of(model)} | known_of(model, columns)
        examples = path_of(examples) if isinstance(examples, str | Path) else examples
        data = read(examples, **options)
        limit = max_length if data.form == "image" else within(max_length, model)
        reading: dict[str, Any] = {"max_length": limit, "overflow": overflow, "chat": chat}
        examples = encode(data, tokenizer, **reading, skip_corrupt=skip_corrupt)
    if not len(examples):
        raise AddendaError("There is no example to evaluate.")
    examples = padded(examples, model, batch)
    batch = examples.at_once(batch)
    started, device = time.perf_counter(), device_of(model)
    lengths = examples.lengths
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    total, count = 0.0, 0
    items, losses = [0] * len(order), [0.0] * len(order)
    with training_mode(model, False):
        first = examples.batch([0])["input_ids"][:, :prefix].to(device) if prefix else None
        cache = cache_of(model(input_ids=first, use_cache=True)) if prefix else None
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            batched = examples.batch(rows, skip=prefix)
            examples.ahead(order[at + batch : at + 2 * batch])
            tensors = {k: t.to(device) for k, t in batched.items()}
            inputs = read_before(model, tensors, cache, prefix)
            made = score(model, inputs, examples.kind, right=True, objective=examples.objective)
            total, count = total + float(made.total), count + made.count
            for i, mean in zip(rows, made.means.tolist(), strict=True):
                losses[i] = mean
            if made.right is not None:
                for i, right in zip(rows, made.right.tolist(), strict=True):
                    items[i] = int(right)
    judged = examples.kind != "value"
    accuracy = sum(items) / len(items) if judged else None
    seconds = time.perf_counter() - started
    return Evaluation(
        items if judged else [],
        accuracy,
        total / count,
        losses,
        seconds,
        examples.tokens,
        examples.unit,
        examples.skipped,
        examples.said,
    )


def known_of(model: nn.Module, columns: dict) -> dict:
    """Return how data is read for a model: the options given, and a classifier's labels by output."""
    if task_of(model) == "causal":
        return columns
    names, outputs = head_of(model)
    return columns | {"labels": of_head(columns.get("labels"), names), "outputs": outputs}


def read_before(model: nn.Module, batch: dict[str, Tensor], cache: Any, n: int) -> dict[str, Any]:
    """Return a batch's inputs behind n first tokens in a cache of one row; without a cache the batch."""
    if cache is None:
        return batch
    cache, rows = copy.deepcopy(cache), len(batch["input_ids"])
    cache.batch_repeat_interleave(rows)
    seen = batch["attention_mask"].new_ones(rows, n)
    mask = torch.cat([seen, batch["attention_mask"]], 1)
    return batch | {"attention_mask": mask, "use_cache": True} | as_given(model, cache)
