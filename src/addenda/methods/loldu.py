"""LoLDU: r numbers on the diagonal between W's own triangular factors (Shi et al. 2024, arXiv 2410.13618).

    W = P L D U   (LU with partial pivoting; L (m × k) unit lower, U (k × n) unit upper triangular, k = min(m, n))

    ΔW = σ P L_r diag(d) U_r,   σ = α/r,   L_r the first r columns, U_r the first r rows, d (r) from zero

    x (…, n) ── U_r (r × n) ── ∘ d ── P L_r (m × r) ── · σ ──┐
         └──────────────────── W (m × n) ────────────────────┴── y

The paper trains z = D_r + d beside a residual W − σ₀ P L_r D_r U_r. This is the same model for the same
gradients; the base stays as it is, and the start is exact. Where σ is trained too, from σ₀ = α/r, it scales the
whole diagonal z: train_sigma="whole" has

    ΔW = P L_r diag((σ − σ₀) D_r + σ d) U_r,   the offset σ − σ₀ from zero

as the paper's. train_sigma=True is what it meant here at first, ΔW = σ P L_r diag(d) U_r: it scales the change alone.

P is applied to the rows of L once. Traps: "the first r" is the order of the pivots, not of their size; L and U are not
orthogonal, the paper's words notwithstanding; its best rows (r = 768) start from other values of z than D_r and so
throw the pretrained weight away. The factors come from W at load, in float64 on the CPU. A pivot too small to divide by
counts as 1, so that its row of U stays as it is.

Cost: r numbers a site (and one more where σ is trained); r (m + n) floats of memory and multiply-adds a token.
Not for tasks far from the pretrained one: tens of numbers move little, and the learning rate decides (3e-3 in
the paper).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, too_high
from addenda.core.method.lowrank import Ranked


@register(
    "loldu",
    title="LoLDU",
    paper="Shi et al. 2024, arXiv:2410.13618",
    equation="ΔW = (α/r) P L_r diag(d) U_r, W = P L D U",
    hypothesis="Rescaling the pretrained weight's own triangular components is enough of a change.",
    family="spectral",
    rate=3e-3,
    published="ViT-B, mean of 6 data sets: LoRA r = 16 76.22, LoLDU r = 768 82.79 with 18 K numbers, full fine- "
    "tuning 87.23. Trap: the best row starts from random z with nothing of W left in place, not from W; "
    "from W it is 82.08 or 81.58. The rate decides: 72.25 at 3e-4.",
    paper_setting="query and value with r = α = the whole width (ViT 768, LLaMA-2 1024; here r = 8), rate 3e-3; its "
    "headline row starts from random z and not from W.",
)
@dataclass(frozen=True)
class LoLDU(Ranked):
    """alpha: None means alpha = rank (σ₀ = 1). train_sigma: σ is one more trained number; "whole" is the paper's."""

    train_sigma: bool | Literal["whole"] = False

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        LU, pivots, _ = torch.linalg.lu_factor_ex(W.cpu().double())
        rows = list(range(len(W)))
        for i, j in enumerate(pivots.tolist()):  # LAPACK's row swaps, counted from 1
            rows[i], rows[j - 1] = rows[j - 1], rows[i]
        L = LU[:, : self.rank].tril(-1)
        L.fill_diagonal_(1.0)
        lower = torch.empty_like(L)
        lower[rows] = L  # P L
        pivot = LU.diagonal()[: self.rank, None]
        tiny = torch.finfo(torch.float32).eps * W.abs().max().item()
        pivot = torch.where(pivot.abs() <= tiny, 1.0, pivot)
        found = {"lower": lower.to(W.dtype), "upper": (LU[: self.rank].triu() / pivot).to(W.dtype)}
        return found | {"pivot": pivot[:, 0].to(W.dtype)} if self.train_sigma == "whole" else found

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        own: Params = {"d": nn.Parameter(torch.zeros(self.rank))}
        if self.train_sigma == "whole":
            own["offset"] = nn.Parameter(torch.zeros(()))
        elif self.train_sigma:
            own["sigma"] = nn.Parameter(torch.tensor(float(self.scale)))
        return own

    def factors(self, p: Params, shape: Shape) -> Factors:
        if self.train_sigma == "whole":
            offset = p["offset"]
            return Factors(p["lower"], p["upper"], offset * p["pivot"] + (offset + self.scale) * p["d"])
        sigma = p["sigma"] if self.train_sigma else self.scale
        return Factors(p["lower"], p["upper"], p["d"] * sigma)

    def trainable(self, m: int, n: int) -> int:
        return self.rank + bool(self.train_sigma)
