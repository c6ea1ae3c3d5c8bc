"""Patch: entries of W are replaced, so that another version of the weights comes back bit for bit.

    W_eff[i, j] = value of (i, j) at K stored positions, W[i, j] elsewhere

What differs between two checkpoints of one model in half precision is seldom all of it, since many steps are smaller
than half of a rounding step. Positions and tuned values are then a lossless and smaller file, which serves to sync
weights that go on being trained: `addenda.reducing.delta.difference` finds them. SHiRA adds its values to W, and a sum
is rounded; here nothing is added. Where other adapters act too, ΔW = W_eff − W adds to theirs, and is rounded again.

A fresh start draws the positions and holds W there; its file holds both. Values of a patch that was made, not trained,
are held in the dtype of the base.

Cost: K numbers and K positions a site. Not for changes of most entries: a whole copy is smaller then.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from addenda.core.base.largest import narrow
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params, WeightMethod


@register(
    "patch",
    title="Patch",
    paper="the sparse difference of two checkpoints, as weights are synced",
    equation="W_eff = W with the values at K stored positions replaced",
    hypothesis="None: it holds any other version of W exactly, in as many numbers as entries differ.",
    family="sparse",
    rate=1e-4,
    paper_setting="the difference of two checkpoints (addenda.reduce); here positions are drawn, and values train.",
)
@dataclass(frozen=True)
class Patch(WeightMethod):
    """density: the share of entries that are replaced, or count: their number K."""

    sized_by: ClassVar[str] = "density"
    density: float = 0.01
    count: int | None = None

    def validate(self):
        if not 0 < self.density <= 1:
            yield f"density must be in (0, 1], got {self.density}"
        if self.count is not None and self.count < 1:
            yield f"count must be at least 1, got {self.count}"

    def check(self, m: int, n: int) -> str | None:
        too_many = self.count is not None and self.count > m * n
        return f"count={self.count} is above {m} × {n}" if too_many else None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        index = rng.choice(W.numel(), self.trainable(*W.shape)).to(W.device)
        return {"values": nn.Parameter(W.flatten()[index]), "index": narrow(index, W.numel())}

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self.effective(W, p) - W

    def effective(self, W: Tensor, p: Params) -> Tensor:
        return W.flatten().index_put((p["index"],), p["values"].to(W.dtype)).view(W.shape)

    def trainable(self, m: int, n: int) -> int:
        return self.count or max(1, round(self.density * m * n))
