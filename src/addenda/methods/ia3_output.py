"""(IA)³ on activations: what keys and values say is scaled, bias included (Liu et al. 2022, arXiv 2205.05638).

    y' = y + d ∘ y      d (m) from 0: the paper's l = 1 + d

`ia3` does the same to weights: diag(d) W, which can be merged but leaves the bias alone. Where the layer has no bias,
as in the paper's models, both are one function, and `ia3` is to be preferred. This one follows the paper, and PEFT, in
layers with a bias, and takes any module that returns activations, quantised layers too. What enters the MLP's second
layer has no bias of its own, so there is nothing to add to `ia3:side=in`:

    attach(model, {"key": "ia3-output", "value": "ia3-output", "*.fc2": "ia3:side=in"})

Cost: m numbers a place, one element-wise pass.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.core.method.hidden import HiddenMethod


@register(
    "ia3-output",
    title="(IA)³ on activations",
    paper="Liu et al. 2022, arXiv:2205.05638",
    equation="y' = y + d ∘ y",
    hypothesis="The features are there; a task only needs some of them louder and others quieter, bias included.",
    family="hidden",
    rate=1e-2,
    paper_setting="keys, values and the MLP's hidden activation (here keys and values: name the MLP's first layer "
    "with targets=).",
)
@dataclass(frozen=True)
class IA3Output(HiddenMethod):
    """No options."""

    targets: ClassVar[tuple[str, ...]] = ("key", "value")

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        return {"d": nn.Parameter(torch.zeros(width))}

    def change(self, x: Tensor, y: Tensor, p: Params, training: bool = False) -> Tensor:
        return y + (y * p["d"]).to(y.dtype)

    def trainable(self, width: int) -> int:
        return width
