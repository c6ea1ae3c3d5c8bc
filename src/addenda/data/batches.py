"""How examples are put together to batches: padding, order and grouping by length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.data.encoded import IGNORE, Kind


@dataclass(frozen=True)
class Collator:
    """Puts rows together to a batch of tensors, padded on the right to the longest (or to a multiple of `multiple`)."""

    pad: int
    kind: Kind
    multiple: int = 1

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask (batch × length), and labels (batch × length for "causal", else batch)."""
        length = max(len(r["input_ids"]) for r in rows)
        length += -length % self.multiple
        fill = {"input_ids": self.pad, "labels": IGNORE, "token_type_ids": 0}
        batch = {}
        for key in rows[0]:
            if key == "labels" and self.kind != "causal":
                dtype = torch.long if self.kind == "class" else torch.float32
                batch[key] = torch.tensor([r[key] for r in rows], dtype=dtype)
            else:
                batch[key] = torch.tensor([r[key] + [fill[key]] * (length - len(r[key])) for r in rows])
        lengths = torch.tensor([len(r["input_ids"]) for r in rows])
        batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        return batch


def batches(
    lengths: Sequence[int], batch: int, steps: int, seed: int = 0, group: bool = True, least: int = 1
) -> list[list[int]]:
    """Return the rows of every step: shuffled passes over the data, the same on every machine for one seed.

    group: put rows of like length together (sorted within stretches of 32 batches, which are then shuffled), so that
    little is padded. A pass ends with a smaller batch where the data does not divide evenly, or without it if it has
    fewer rows than `least`.
    """
    n, schedule, epoch = len(lengths), [], 0
    while len(schedule) < steps:
        rng = Stream(seed, "order", str(epoch))
        order = np.argsort(rng.raw(n), kind="stable")
        if group:
            pieces = [order[i : i + 32 * batch] for i in range(0, n, 32 * batch)]
            order = np.concatenate([p[np.argsort([-lengths[i] for i in p], kind="stable")] for p in pieces])
        rows = [order[i : i + batch].tolist() for i in range(0, n, batch)]
        rows = [r for r in rows if len(r) >= least]
        if not rows:
            raise AddendaError(f"{n} examples cannot be cut into {least} parts of a step. Use a smaller accumulate=.")
        if group:
            rows = [rows[i] for i in np.argsort(rng.raw(len(rows)), kind="stable")]
        schedule, epoch = schedule + rows, epoch + 1
    return schedule[:steps]
