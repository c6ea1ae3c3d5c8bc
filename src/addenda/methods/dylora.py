"""DyLoRA: a LoRA whose first b ranks are a good adapter for every b (Valipour et al. 2022, arXiv 2210.07558).

    each step draws b uniformly from min_rank … rank, the same b at every site:   ΔW = (α/b) B[:, :b] A[:b]

    A (r × n)  Kaiming-uniform     B (m × r)  zeros     active  b: the drawn one in training, the stored one otherwise

With `frozen`, only the b-th row of A and column of B get a gradient; those before it act as constants. The
draw is a tensor (ranks beyond b are multiplied by 0), so nothing recompiles. `set_rank(adapter, b)` chooses
the rank that acts outside training and is saved. The scale is α/b at every b, as in the released code:
cutting to b gives a plain LoRA with the same alpha.

Traps: Adam's momentum and weight decay go on moving rows that got no gradient, so `frozen` freezes nothing
but the gradient. The paper's "4 to 7 times faster" is one run against one run for every rank; a step costs
what LoRA's costs.

Cost: r (m + n) numbers a site, two rank-r products a pass. Not needed where the rank is known beforehand.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.adapter import Adapter
from addenda.core.errors import AddendaError
from addenda.core.method import Factors, Params, Shape, WeightMethod, too_high
from addenda.core.random import Stream
from addenda.core.registry import register


@register(
    "dylora",
    title="DyLoRA",
    paper="Valipour et al. 2022, arXiv:2210.07558",
    equation="ΔW = (α/b) B[:, :b] A[:b], b drawn every step",
    hypothesis="The change has low rank, and its directions can be ordered so that any first few do best.",
    family="low-rank",
    rate=3e-3,
)
@dataclass(frozen=True)
class DyLoRA(WeightMethod):
    """rank: the largest. alpha: None means alpha = rank, a scale of 1 at the full rank. frozen: see the module."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 8
    min_rank: int = 1
    alpha: float | None = None
    dropout: float = 0.0
    frozen: bool = False

    def validate(self):
        if not 1 <= self.min_rank <= self.rank:
            yield f"1 <= min_rank <= rank must hold, got min_rank={self.min_rank}, rank={self.rank}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {
            "A": nn.Parameter(rng.kaiming_uniform(self.rank, n)),
            "B": nn.Parameter(torch.zeros(m, self.rank)),
            "active": torch.tensor(self.rank),
        }

    def on_step(self, step: int, rng: Stream) -> Params:
        return {"active": torch.tensor(rng.integer(self.min_rank, self.rank))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        A, B, b = p["A"], p["B"], p["active"]
        rank = torch.arange(1, self.rank + 1, device=A.device)
        if self.frozen:
            last = rank == b
            A, B = torch.where(last[:, None], A, A.detach()), torch.where(last, B, B.detach())
        alpha = self.rank if self.alpha is None else self.alpha
        return Factors(B, A, (rank <= b).to(B.dtype) * (alpha / b.to(B.dtype)))

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n)


def set_rank(adapter: Adapter, rank: int) -> None:
    """Choose the rank that acts when the model is not training, at every DyLoRA site; it is saved with the adapter.

    Raises AddendaError when the adapter has no DyLoRA site or the rank is not within one's range.
    """
    sites = [(t, t.method.rank) for _, t in adapter.sites() if isinstance(t.method, DyLoRA)]
    if not sites:
        raise AddendaError(f"{adapter.name!r} has no DyLoRA site whose rank could be set.")
    least = min(most for _, most in sites)
    if not 1 <= rank <= least:
        raise AddendaError(f"rank must be from 1 to {least}, got {rank}.")
    for t, _ in sites:
        t.stored()["active"].fill_(rank)
