"""Sparse: ΔW is zero but for values at given positions, in matrices, embeddings and vectors.

    W_eff = W + scatter(values, positions),   K values from 0, positions fixed

It is the form of lottery-ticket sparse fine-tuning (Ansell et al. 2022, arXiv 2110.07560): `addenda.lottery` finds the
positions, over all of a model's parameters together. Unlike SHiRA, which chooses inside each matrix, it goes into
biases and gains of norms too, and its changes are meant to be added: a language's and a task's act at once, entry by
entry.

`attach(model, "sparse", positions={path: positions})` takes positions as they are, and its file holds them. Without,
they are drawn: density of each site, count at each, or total over all sites, dealt out by their sizes.

An embedding is looked up as it is, and the changes of those rows are added; gradients are gathered at the rows that a
batch reads. No copy of the table is made, and no dense gradient of it. Decay by an optimizer pulls to the base, as it
acts on values; full fine-tuning's pulls to 0.

Cost: K numbers and K positions. A linear layer's gradient is one dense product, gathered at once, so training takes
what full fine-tuning takes but for its optimizer. Not to save time: for another task or language beside the first.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.largest import narrow
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params, Shape, WeightMethod


@register(
    "sparse",
    title="Sparse",
    paper="Ansell et al. 2022 (lottery-ticket sparse fine-tuning), arXiv:2110.07560",
    equation="ΔW = scatter(values at K given positions), vectors too",
    hypothesis="What a task or a language needs are a few entries of all of a model, and the changes of both add up.",
    family="sparse",
    rate=1e-3,
    paper_setting="positions of the largest change in a full fine-tuning (addenda.lottery), 4 to 8 % of multilingual "
    "BERT, rate 5e-5 for languages and 2e-5 for tasks; here 1 % of every linear layer, drawn.",
)
@dataclass(frozen=True)
class Sparse(WeightMethod):
    """density: the share of entries that are trained; or count: their number at each site; or total: over all sites."""

    sized_by: ClassVar[str] = "density"
    any_shape: ClassVar[bool] = True
    density: float = 0.01
    count: int | None = None
    total: int | None = None

    def validate(self):
        if not 0 < self.density <= 1:
            yield f"density must be in (0, 1], got {self.density}"
        for name, value in (("count", self.count), ("total", self.total)):
            if value is not None and value < 1:
                yield f"{name} must be at least 1, got {value}"
        if self.count is not None and self.total is not None:
            yield f"count is of each site and total of all; give one of them, got {self.count} and {self.total}"

    def check(self, m: int, n: int) -> str | None:
        too_many = self.count is not None and self.count > m * n
        return f"count={self.count} is above {m} × {n}" if too_many else None

    def placed(self, count: int) -> "Sparse":
        return Sparse(count=count)

    def allot(self, shapes: list[Shape], seen: list[Tensor]) -> "list[Sparse | None]":
        """Deal `total` out by the sites' sizes, to one (the largest remainders first); a site may be left without."""
        if self.total is None:
            return [self for _ in shapes]
        sizes = [m * n for m, n in shapes]
        if self.total > sum(sizes):
            raise AddendaError(f"total={self.total:,} is above the {sum(sizes):,} entries of all {len(sizes)} sites.")
        shares = [divmod(self.total * size, sum(sizes)) for size in sizes]
        counts = [whole for whole, _ in shares]
        for i in sorted(range(len(sizes)), key=lambda i: -shares[i][1])[: self.total - sum(counts)]:
            counts[i] += 1
        return [Sparse(count=count) if count else None for count in counts]

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        index = p["positions"] if "positions" in p else rng.choice(W.numel(), self.trainable(W.numel(), 1))
        return {"values": nn.Parameter(torch.zeros(len(index))), "index": narrow(index, W.numel())}

    def sparse(self, p: Params, shape: Shape) -> tuple[Tensor, Tensor]:
        return p["index"], p["values"]

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return W.new_zeros(W.numel()).index_put((p["index"],), p["values"].to(W.dtype)).view(W.shape)

    def effective(self, W: Tensor, p: Params) -> Tensor:
        wide = torch.promote_types(W.dtype, p["values"].dtype)
        return W.to(wide).flatten().index_put((p["index"],), p["values"].to(wide), accumulate=True).view(W.shape)

    def trainable(self, m: int, n: int) -> int:
        if self.total is not None:  # of a single site, before `allot`
            return min(self.total, m * n)
        return self.count or max(1, round(self.density * m * n))
