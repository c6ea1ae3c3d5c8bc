"""Encoded examples: what training, judging and measuring ask of them, whatever they are made of.

`encode.Tokens` are texts as token ids, `pixels.Images` are pictures as pixels, `masked.Masked` texts to be filled in;
`ranking.groups.Groups` are rows of texts or pictures that are judged together.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor
from torch.utils.data import Dataset

IGNORE = -100
Kind = Literal["causal", "class", "value", "masked", "group"]
TARGETS = ("labels", "table", "group", "teacher", "among")  # what a batch holds besides the model's inputs


class Objective(Protocol):
    """What is learned of groups of rows, or of the places of a causal LM's labels.

    scores (N) float32: the model's one output for every row. batch: labels (N); group (G × M), the rows of each group,
    −1 behind its last; teacher (N), where another model's scores are learned from. Returns the loss of each group (G).
    For a causal LM scores are its logits at the N labels (N × V), in the order of the rows, and a loss is of each (N).
    """

    def __call__(self, scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor: ...


class Encoded(Dataset, ABC):
    """Examples as a model takes them, in order.

    labels: for "causal", "masked" and "group" a list beside each, else one number each. names: of the classes. unit:
    what `lengths` count. ragged: whether lengths differ, so that batches are padded and rows of like length are put
    together. objective: the loss of a "group", and of a causal LM's labels where it is not cross-entropy.
    """

    unit: ClassVar[str]
    ragged: ClassVar[bool]
    labels: list[Any]
    kind: Kind
    names: tuple[str, ...] | None
    said: tuple[str, ...] = ()  # what was understood of the data, in words
    objective: Objective | None = None
    skipped: tuple[str, ...] = ()  # what could not be read and was left out, where that was asked for

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """How many tokens, or images, there are to read in each example."""

    @property
    def tokens(self) -> int:
        """How many tokens, or images, there are to read in all."""
        return sum(self.lengths)

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what the model is given."""

    @abstractmethod
    def take(self, rows: Sequence[int]) -> Self:
        """Return the examples at these positions, in this order."""

    def first(self, n: int) -> Self:
        """Return the first n examples, or all if there are fewer."""
        return self if len(self) <= n else self.take(range(n))

    @abstractmethod
    def batch(self, rows: Sequence[int], skip: int = 0) -> dict[str, Tensor]:
        """Return the inputs and labels of these examples, without their first `skip` tokens."""

    def filled(self, pad: int) -> Self:
        """Return the examples with short rows filled by this token; those without tokens as they are."""
        return self

    def at_once(self, rows: int) -> int:
        """Return how many examples to judge at once, so that the model is given about so many rows."""
        return rows

    def drawn(self, step: int) -> Self:
        """Return the examples as this micro-batch of a run is given them; the same ones where nothing is drawn."""
        return self

    def ahead(self, rows: Sequence[int]) -> None:
        """Begin to prepare these rows, which come next; does nothing where all is in memory."""
