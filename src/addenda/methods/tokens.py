"""Trainable tokens: some rows of an embedding are trained, the others stay as they are (PEFT's TrainableTokens).

    ΔW = P V,   V (K × n) trained from 0,   P (m × K) has a one at (row of the k-th token, k)

For tokens that were added to the vocabulary, or whose meaning changes. Rows are named by the option `tokens`, joined by
"+", stretches by "-": tokens="5+7+100-120". Row k of V belongs to the k-th of them in rising order.

PEFT trains the rows themselves and puts them in place of the base's; here their offsets are trained, which is the same
for a given base, and an adapter file knows its base. Rows that are not named keep their bits.

Where the embedding is tied to the output head, "embedding" is refused with what to write instead: a target such as
"embed_tokens.weight" names the tensor, and then lookup and head both see the change. Gradients reach a row only through
its token's appearances, and in a tied head through every softmax.

Cost: K n numbers; K floats for each of the m rows while a layer runs (a tied weight: a copy of it). Not for thousands
of tokens: train the whole embedding with also_train.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod

_ROWS = re.compile(r"[0-9]{1,12}(-[0-9]{1,12})?(\+[0-9]{1,12}(-[0-9]{1,12})?)*")


@register(
    "trainable-tokens",
    title="Trainable tokens",
    paper="no paper; as PEFT's TrainableTokens",
    equation="ΔW = rows V at the named tokens, 0 elsewhere",
    hypothesis="What a task adds is the meaning of a few tokens, not how tokens are combined.",
    family="sparse",
    rate=3e-3,
    paper_setting="",
)
@dataclass(frozen=True)
class TrainableTokens(WeightMethod):
    """tokens: the rows, such as "5+7+100-120"."""

    targets: ClassVar[str] = "embedding"
    tokens: str = "0"

    def validate(self):
        if not _ROWS.fullmatch(self.tokens):
            yield f"tokens must be rows and stretches joined by +, such as '5+7+100-120', got {self.tokens[:80]!r}"
            return
        for first, last in self._stretches:
            if last < first:
                yield f"tokens: the stretch {first}-{last} ends before it begins"
        for (_, last), (first, _) in pairwise(self._stretches):
            if first <= last:
                yield f"tokens names row {first} twice"

    @property
    def _stretches(self) -> list[tuple[int, int]]:
        """(first, last) row of every stretch, rising. Nothing is as long as the stretches are: a file may name any."""
        parts = (part.partition("-") for part in self.tokens.split("+"))
        return sorted((int(first), int(last or first)) for first, _, last in parts)

    @property
    def _rows(self) -> int:
        """How many rows are named."""
        return sum(last - first + 1 for first, last in self._stretches)

    def check(self, m: int, n: int) -> str | None:
        last = self._stretches[-1][1]
        return f"tokens names row {last}, and the weight has rows 0 to {m - 1}" if last >= m else None

    def derive(self, W: Tensor, rng: Stream) -> Params:
        return {"index": torch.cat([torch.arange(first, last + 1) for first, last in self._stretches])}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"values": nn.Parameter(torch.zeros(self._rows, W.shape[1]))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        values, index = p["values"], p["index"]
        rows = torch.arange(shape[0], device=index.device)
        return Factors((rows[:, None] == index).to(values.dtype), values)

    def effective(self, W: Tensor, p: Params) -> Tensor:
        return W.index_add(0, p["index"], p["values"])

    def trainable(self, m: int, n: int) -> int:
        return n * self._rows
