"""BitFit: only biases are trained (Ben Zaken et al. 2021, arXiv 2106.10199).

    y = x Wᵀ + b,   b a trained copy        W and everything else frozen

It starts at the base's own values, so the start is exact. By default it goes to every bias of the model, those of
normalisation layers included; the paper trains the task's head beside them (also_train). A model without biases, as
most recent language models are, has nothing to train, and attaching says so.

Traps: decay by an optimizer of your own pulls biases to 0, not to the base (ours leave them out). On weights it is
full fine-tuning.

Cost: m numbers a layer, about a thousandth of a model; no more time than the base. Backward needs no inputs of layers,
only gradients of outputs. Not for large data, where full fine-tuning pulls ahead in the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

from addenda.core.method.catalogue import register
from addenda.core.method.contract import Replace


@register(
    "bitfit",
    title="BitFit",
    paper="Ben Zaken et al. 2021, arXiv:2106.10199",
    equation="b_eff = a trained copy of b",
    hypothesis="Training on a task exposes what the network knows; moving its thresholds is enough for that.",
    family="dense",
    rate=3e-3,
    paper_setting="",
)
@dataclass(frozen=True)
class BitFit(Replace):
    """No options."""

    targets: ClassVar[str] = "bias"
