"""DyLoRA: a LoRA whose first b ranks are a good adapter for every b (Valipour et al. 2022, arXiv 2210.07558).

    each step draws b uniformly from min_rank … rank, the same b at every site:   ΔW = (α/b) B[:, :b] A[:b]

    A (r × n)  Kaiming-uniform     B (m × r)  zeros     active  b: the drawn one in training, the stored one otherwise

With `frozen`, only the b-th row of A and column of B get a gradient; those before it act as constants. The
draw is a tensor (ranks beyond b are multiplied by 0), so nothing recompiles. The scale is α/b at every b, as in the
released code: cutting to b gives a plain LoRA with the same alpha. In `addenda.exporting.nested`, `set_rank(adapter,
b)` chooses the rank that acts outside training and is saved, `export(adapter, b)` attaches that plain LoRA beside it,
and `search_rank` finds the smallest b that a score of yours calls good enough, without training.

With `unit` (LyCORIS's block size) b is drawn in multiples of it, and `frozen` trains the last unit of ranks. LyCORIS
scales by α over the number of units, this by α over the number of ranks.

The released script always has frozen=True, r = 8 and alpha=16 on query and value; here frozen=False and alpha = rank.

Traps: plain Adam would go on moving rows that got no gradient, by momentum and weight decay, so `frozen` is
trained by "rowwise-adamw", which leaves them alone bit for bit; with plain AdamW only their gradient is
frozen. The paper's "4 to 7 times faster" is one run against one run for every rank; a step costs
what LoRA's costs.

Cost: r (m + n) numbers a site, two rank-r products a pass. Not needed where the rank is known beforehand.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import FactorPair, Factors, Params, Shape, WeightMethod, too_high


@register(
    "dylora",
    title="DyLoRA",
    paper="Valipour et al. 2022, arXiv:2210.07558",
    equation="ΔW = (α/b) B[:, :b] A[:b], b drawn every step",
    hypothesis="The change has low rank, and its directions can be ordered so that any first few do best.",
    family="low-rank",
    rate=3e-3,
    published="As later papers print it, RoBERTa-base, mean of 6 tasks: full fine-tuning 85.2, LoRA 85.2, DyLoRA "
    "84.5 (FourierFT's); GPT-2 medium, E2E BLEU: LoRA 68.9, DyLoRA 69.2 (VeRA's).",
    paper_setting="r = 8 with α = 16 (here α = r) on query and value; the released script always has frozen=True, "
    "where only the drawn rank's own row learns (here False).",
)
@dataclass(frozen=True)
class DyLoRA(WeightMethod):
    """rank: the largest. alpha: None means alpha = rank, a scale of 1 at the full rank. frozen: see the module."""

    sized_by: ClassVar[str] = "rank"
    helpers: ClassVar[tuple[str, ...]] = ("ranks",)
    rank: int = 8
    min_rank: int = 1
    alpha: float | None = None
    dropout: float = 0.0
    frozen: bool = False
    unit: int = 1

    def validate(self):
        if not 1 <= self.min_rank <= self.rank:
            yield f"1 <= min_rank <= rank must hold, got min_rank={self.min_rank}, rank={self.rank}"
        if self.unit < 1 or self.rank % self.unit:
            yield f"unit must divide rank, got unit={self.unit}, rank={self.rank}"
        if self.alpha is not None and self.alpha <= 0:
            yield f"alpha must be above 0, got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    @property
    def ranks(self) -> range:
        """The ranks that are drawn: multiples of unit from min_rank on."""
        return range(-(-self.min_rank // self.unit) * self.unit, self.rank + 1, self.unit)

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {
            "A": nn.Parameter(rng.kaiming_uniform(self.rank, n)),
            "B": nn.Parameter(torch.zeros(m, self.rank)),
            "active": torch.tensor(self.rank),
        }

    def check_values(self, p: Params) -> str | None:
        least, most = int(p["active"].min()), int(p["active"].max())
        if least >= 1 and most <= self.rank:
            return None
        return f"active says that {least if least < 1 else most} ranks act, and from 1 to {self.rank} may"

    def on_step(self, step: int, rng: Stream) -> Params:
        return {"active": torch.tensor(self.ranks[rng.integer(0, len(self.ranks) - 1)])}

    def factors(self, p: Params, shape: Shape) -> Factors:
        A, B, b = p["A"], p["B"], p["active"]
        rank = torch.arange(1, self.rank + 1, device=A.device)
        if self.frozen:
            last = (rank <= b) & (rank > b - self.unit)
            A, B = torch.where(last[:, None], A, A.detach()), torch.where(last, B, B.detach())
        alpha = self.rank if self.alpha is None else self.alpha
        return Factors(B, A, (rank <= b).to(B.dtype) * alpha / b.to(B.dtype))

    @property
    def trained_by(self) -> str:
        return "rowwise-adamw" if self.frozen else "adamw"

    def pair(self, p: Params) -> FactorPair:
        b = p["active"].flatten()[0]  # the same for every matrix of a stack
        live = (torch.arange(self.rank, device=b.device) < b).to(p["A"].dtype)
        alpha = self.rank if self.alpha is None else self.alpha
        return FactorPair(p["B"] * live, p["A"] * live[:, None], alpha / int(b))

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n)
