"""(IA)³: a layer's outputs, or its inputs, are scaled one by one (Liu et al. 2022, arXiv 2205.05638).

    side="out":  ΔW = diag(d) W   (d: m)        y = base(x) + d ∘ (base(x) − bias)
    side="in":   ΔW = W diag(d)   (d: n)        y = base(x ∘ (1 + d))

The paper trains l = 1 + d, from 1; with the offset d the start is exact and weight decay pulls towards the base. It
scales keys, values and what enters the second layer of the MLP:

    attach(model, {"k_proj": "ia3", "v_proj": "ia3", "down_proj": "ia3:side=in"})

Traps: as a change of the weight it leaves the bias alone, where the paper (whose models have none) and PEFT scale the
whole output. The rows of an embedding are its tokens: there side="in" scales features. In bfloat16 an offset below
1/512 is rounded away until it has grown.

Cost: m (or n) numbers a site, no products. It can weigh neurons that are there, and makes no new ones: not for tasks
far from the pretrained one.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "ia3",
    title="(IA)³",
    paper="Liu et al. 2022, arXiv:2205.05638",
    equation="ΔW = diag(d) W, or W diag(d)",
    hypothesis="The features are there; a task only needs some of them louder and others quieter.",
    family="scale",
    rate=1e-2,
    paper_setting="keys, values and the hidden layer of the MLP (here every linear layer, on its outputs), T0-3B, "
    "Adafactor at rate 3e-3, 1,000 steps of 8 (paper, §3.3 and §3.5).",
)
@dataclass(frozen=True)
class IA3(WeightMethod):
    """side: scale the layer's outputs ("out") or its inputs ("in")."""

    elementwise: ClassVar[bool] = True
    side: Literal["out", "in"] = "out"

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"d": nn.Parameter(torch.zeros(W.shape[0 if self.side == "out" else 1]))}

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return (p["d"][:, None] if self.side == "out" else p["d"]) * W

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        if self.side == "in":
            return base((x * (1 + p["d"])).to(x.dtype))
        y = base(x)
        own = y if base.bias is None else y - base.bias
        return y + (own * p["d"]).to(y.dtype)

    def trainable(self, m: int, n: int) -> int:
        return m if self.side == "out" else n
