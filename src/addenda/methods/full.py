"""Full fine-tuning: every entry of W is trained, the control of every claim about fewer parameters.

W_eff = value, a float32 copy of W. Cost: m n numbers a site, with gradients and two Adam moments 16 bytes each.
"""

from dataclasses import dataclass
from typing import ClassVar

from addenda.core.method.catalogue import register
from addenda.core.method.contract import Replace


@register(
    "full",
    title="Full fine-tuning",
    paper="the baseline of every paper here",
    equation="W_eff = a trained copy of W",
    hypothesis="None: the change may be anything.",
    family="dense",
    rate=1e-4,
    paper_setting="the control of every paper, at rates of 1e-5 to 2e-5 for large language models.",
)
@dataclass(frozen=True)
class Full(Replace):
    """No options."""

    targets: ClassVar[str] = "parameters"
