"""Training data as groups that are judged together: each item is a whole group, and nothing ever cuts one.

    rows      a b c | d e | f g h i          three groups of an `Encoded`: texts, images, …
    batch([0, 2]) → inputs of a b c f g h i,  group [[0, 1, 2, −1], [3, 4, 5, 6]],  labels of the seven

`AdapterTrainer` counts, shuffles and cuts items: the parts of an accumulated step, the shares of several processes, the
batches of an evaluation. As an item is a group here, a loss over a group sees all of it wherever it is computed. What
the rows are made of is the business of the `Encoded` below; what is learned of them that of the objective.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.data.encoded import Encoded, Kind, Objective


@dataclass(frozen=True)
class Groups(Encoded):
    """Groups of the rows of an `Encoded`, one behind the other.

    labels: of the rows of each group. teacher: another model's scores of them, where the objective wants them. Its
    `repr` must say all that decides its numbers: it is a part of the digest.
    Raises AddendaError for an empty group, for labels or scores that are not one finite number for each row, and for
    more or fewer rows than the groups have.
    """

    ragged: ClassVar[bool] = True
    rows: Encoded
    labels: list[list[float]]
    objective: Objective  # type: ignore[reportIncompatibleVariableOverride]  # which is not optional here
    teacher: list[list[float]] | None = None
    said: tuple[str, ...] = ()

    kind: ClassVar[Kind] = "group"
    names: ClassVar[None] = None

    def __post_init__(self):
        sizes = [len(labels) for labels in self.labels]
        if 0 in sizes:
            raise AddendaError(f"Group {sizes.index(0)} has no row. Leave empty groups out.")
        if sum(sizes) != len(self.rows):
            raise AddendaError(f"The groups have {sum(sizes)} rows, and there are {len(self.rows)}.")
        if self.teacher is not None and [len(scores) for scores in self.teacher] != sizes:
            raise AddendaError("The teacher's scores are not one for each row of each group.")
        for what, values in (("label", self.labels), ("teacher's score", self.teacher or [])):
            for i, row in enumerate(values):
                if wild := [v for v in row if not math.isfinite(v)]:
                    raise AddendaError(f"Group {i} has a {what} that is no number: {wild[0]}.")

    @property
    def unit(self) -> str:  # type: ignore[reportIncompatibleVariableOverride]
        return self.rows.unit

    @property
    def pad(self) -> int | None:
        """The token that fills short rows; None where rows are no texts."""
        return getattr(self.rows, "pad", None)

    @property
    def skipped(self) -> tuple[str, ...]:  # type: ignore[reportIncompatibleVariableOverride]
        return self.rows.skipped

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each group, and the number of all rows."""
        return list(accumulate((len(labels) for labels in self.labels), initial=0))

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens, or images, there are in each group."""
        return [sum(self.rows.lengths[a:b]) for a, b in zip(self.starts, self.starts[1:], strict=False)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows, the groups, their labels, the teacher's scores and the loss."""
        digest = hashlib.sha256(self.rows.digest.encode())
        digest.update(repr((self.labels, self.teacher, self.objective)).encode())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "Groups":
        teacher = None if self.teacher is None else [self.teacher[i] for i in rows]
        return replace(
            self, rows=self.rows.take(self._of(rows)), labels=[self.labels[i] for i in rows], teacher=teacher
        )

    def filled(self, pad: int) -> "Groups":
        return replace(self, rows=self.rows.filled(pad))

    def at_once(self, rows: int) -> int:
        return max(rows // max(len(labels) for labels in self.labels), 1)

    def ahead(self, rows: Sequence[int]) -> None:
        self.rows.ahead(self._of(rows))

    def batch(self, rows: Sequence[int], skip: int = 0) -> dict[str, Tensor]:
        """Return the inputs of all N rows of these G groups, their labels (N), and which rows each group has (G × M).

        A group's entries are positions in the batch, −1 behind its last; teacher (N) is there where there is one.
        """
        made = self.rows.batch(self._of(rows), skip)
        sizes = [len(self.labels[i]) for i in rows]
        places = torch.arange(max(sizes))
        starts, counts = (torch.tensor(t)[:, None] for t in (list(accumulate(sizes, initial=0))[:-1], sizes))
        group = torch.where(places < counts, starts + places, -1)
        labels = torch.tensor([y for i in rows for y in self.labels[i]], dtype=torch.float32)
        made |= {"labels": labels, "group": group}
        if self.teacher is not None:
            made["teacher"] = torch.tensor([t for i in rows for t in self.teacher[i]], dtype=torch.float32)
        return made

    def _of(self, groups: Sequence[int]) -> list[int]:
        return [row for i in groups for row in range(self.starts[i], self.starts[i + 1])]
