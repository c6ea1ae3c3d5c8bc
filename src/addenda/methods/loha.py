"""LoHa: the entry-wise product of two low-rank products (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098).

    ΔW = s (B1 A1) ∘ (B2 A2),   s = α/r        B1, B2: m × r;  A1, A2: r × n;  rank up to r²

It is FedPara's form of a weight, used as a change by LyCORIS (Yeh et al. 2023, 2309.14859) and PEFT. As in PEFT, B1, A1
and B2 start Kaiming-uniform and A2 at zero, so the start is exact; LyCORIS starts from normal numbers. Until A2 has
moved nothing else does, and the first product starts small, so the learning rate wants to be larger than LoRA's.

The product is a sum over all pairs of columns, (b1_i ∘ b2_j)(a1_i ∘ a2_j)ᵀ: up to rank 16 ΔW acts through these r²
thin factors and is never formed. Above that it is formed once a pass.

Cost: 2 r (m + n) numbers a site, those of a LoRA of twice the rank; two rank-r² products a pass. Not for short runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape
from addenda.core.method.lowrank import Ranked

_THIN = 16  # the highest rank whose r² factors are cheaper than a dense change


@register(
    "loha",
    title="LoHa",
    paper="Hyeon-Woo et al. 2021, arXiv:2108.06098",
    equation="ΔW = (α/r) (B1 A1) ∘ (B2 A2)",
    hypothesis="The change needs a rank of r², but no more freedom than two rank-r matrices have.",
    family="low-rank",
    rate=1e-2,
    paper_setting="no adapter: FedPara parametrises whole layers, trained from scratch in federated learning. The "
    "adapter on frozen weights, with α, is LyCORIS'.",
)
@dataclass(frozen=True)
class LoHa(Ranked):
    """rank: of each of the two products. alpha: None means alpha = rank (scale 1)."""

    def has(self, hook: str) -> bool:
        return super().has(hook) and (hook != "factors" or self.rank <= _THIN)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        (m, n), r = W.shape, self.rank
        return {
            "B1": nn.Parameter(rng.kaiming_uniform(m, r)),
            "A1": nn.Parameter(rng.kaiming_uniform(r, n)),
            "B2": nn.Parameter(rng.kaiming_uniform(m, r)),
            "A2": nn.Parameter(torch.zeros(r, n)),
        }

    def factors(self, p: Params, shape: Shape) -> Factors:
        B = (self.scale * p["B1"][:, :, None] * p["B2"][:, None]).flatten(1)
        A = (p["A1"][:, None] * p["A2"]).flatten(0, 1)
        return Factors(B, A)

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self.scale * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])

    def trainable(self, m: int, n: int) -> int:
        return 2 * self.rank * (m + n)
