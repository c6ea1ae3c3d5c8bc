"""RoAd: pairs of outputs are turned and scaled (Liao & Monz 2024, arXiv 2409.00119).

    (y_i)   (α₁ cos θ₁   −α₁ sin θ₁) (h_i)
    (y_j) = (α₂ sin θ₂    α₂ cos θ₂) (h_j) ,   h = x Wᵀ,   so  W' = R W        (i, j): a pair, g/2 apart

"road_1": one α and one θ a pair; "road_2": one of each an output, as written; "road_4": one of each for every entry of
the 2 × 2 matrix. θ = 0 and α = 1 at the start. α is trained as its offset from 1, and R − I is applied, so that the
start is exact; weight decay then pulls α to 1. "road_1" can only turn and stretch a pair; "road_2" takes
it through any 2 × 2 matrix, and "road_4" has eight numbers for the same four.

The paper pairs neighbours (group=2, the default); PEFT pairs outputs half a group apart (its default is group=64).
Trap: PEFT turns the bias too, y = R (x Wᵀ + bias), and changes it when merging. Here, as in the paper, h has no bias: R
acts on x Wᵀ alone, so that the change is one of W and nothing else.

Cost: m, 2 m or 4 m numbers; two multiplications and an addition for every output, and no product at all. Not for
changes that must mix more than two outputs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "road",
    title="RoAd",
    paper="Liao & Monz 2024, arXiv:2409.00119",
    equation="W' = R W, R = blockdiag(α_i (cos θ_i −sin θ_i; sin θ_i cos θ_i))",
    hypothesis="Finetuning changes the angles of representations, and turning pairs of outputs is enough for that.",
    family="rotation",
    rate=1e-2,
    paper_setting="RoAd_1 on all linear layers, as here, RoBERTa at rates of 1e-3 and 3e-3, LLaMA at 3e-3; RoAd_2 "
    "and RoAd_4 too on LLaMA (paper, §4 and appendix C). PEFT pairs outputs 32 apart (group 64; here 2, the paper's).",
)
@dataclass(frozen=True)
class RoAd(WeightMethod):
    """variant: how many numbers a pair has, see the module. group: outputs half a group apart are paired."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group: int = 2

    def validate(self):
        if self.group < 2 or self.group % 2:
            yield f"group must be even and at least 2, got {self.group}"

    def check(self, m: int, n: int) -> str | None:
        return f"group={self.group} does not divide the output width {m}" if m % self.group else None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        size = self.trainable(*W.shape) // 2
        return {"angle": nn.Parameter(torch.zeros(size)), "scale": nn.Parameter(torch.zeros(size))}

    def _columns(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of angles or scales: what an output's own factor takes, and its partner's; m numbers each."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        if self.variant == "road_4":
            own, other = t.view(-1, 2, self.group).unbind(1)
            return own.flatten(), other.flatten()
        if self.variant == "road_1":
            t = t.view(-1, 1, self.group // 2).expand(-1, 2, -1).flatten()
        return t, t

    def _change(self, h: Tensor, p: Params) -> Tensor:
        """(R − I) h for h (…, m)."""
        angle, angle_other = self._columns(p["angle"])
        scale, scale_other = self._columns(p["scale"])
        own, other = (1 + scale) * angle.cos() - 1, (1 + scale_other) * angle_other.sin()
        first, second = other.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        other = torch.stack([-first, second], -2).flatten()
        first, second = h.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        partner = torch.stack([second, first], -2).flatten(-3)
        return torch.addcmul(h * own.to(h.dtype), partner, other.to(h.dtype))

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        y = base(x)
        return y + self._change(y if base.bias is None else y - base.bias, p)

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self._change(W.T, p).T

    def trainable(self, m: int, n: int) -> int:
        return m * int(self.variant[-1])
