"""Dense ΔW: every entry of a change is a number of its own, in full precision or in 1 to 8 bits.

    W_eff = W + D,   D (m × n) trained, from 0

Unlike full fine-tuning's copy of W, the change stands alone: it adds to others, and with `bits` it becomes codes of a
few bits. At one bit it is the form of BitDelta (Liu et al. 2024, arXiv 2402.10193), W + a sign(Δ), beside a mean:
`addenda.reduce(adapter, to="bits")` makes it of any other adapter, with the scale of least squares. BitDelta goes on to
train the scales on the tuned model's logits; here D itself is trained behind its codes (`core.packed.few_bits`).

Cost: m n numbers a site in training, as full fine-tuning; m n bits / 8 bytes a site in a file of codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params, WeightMethod


@register(
    "dense-delta",
    title="Dense ΔW",
    paper="full fine-tuning as a change; in one bit Liu et al. 2024 (BitDelta), arXiv:2402.10193",
    equation="ΔW = D, m × n",
    hypothesis="None: the change may be anything. In few bits: which way each entry moves says more than how far.",
    family="dense",
    rate=1e-4,
    paper_setting="BitDelta: bits=1 of a finished fine-tuning (addenda.reduce), whose scales are then trained "
    "against the tuned model's logits; here a new D is trained.",
)
@dataclass(frozen=True)
class DenseDelta(WeightMethod):
    """No options of its own."""

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"change": nn.Parameter(torch.zeros(*W.shape, device=W.device))}

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return p["change"]

    def trainable(self, m: int, n: int) -> int:
        return m * n
