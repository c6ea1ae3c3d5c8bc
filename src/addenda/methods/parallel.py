"""Adapters beside the MLP, with a scale (He et al. 2022, arXiv 2110.04366).

    y' = MLP(x) + s (U f(D x + b) + c)      x: what the MLP's first layer reads

    x ──┬── MLP ───────────────┬── + residual …
        └── D ── f ── U ── · s ┘

s = 4 and relu are what the `adapters` library's `par_bn` starts from; it can also learn s, which here is fixed.

Cost: 2 d r + r + d numbers a block. What the adapter computes does not wait for the MLP, and the MLP's input is one
that the base's own layers read, so it is kept once.
"""

from dataclasses import dataclass
from typing import ClassVar

from addenda.core.method.bottleneck import Bottleneck
from addenda.core.method.catalogue import register
from addenda.core.method.hidden import Reads


@register(
    "parallel",
    title="Parallel adapters",
    paper="He et al. 2022, arXiv:2110.04366",
    equation="y' = MLP(x) + s (U f(D x + b) + c)",
    hypothesis="A task adds a few neurons to each MLP: they read what the MLP reads, and add to what it says.",
    family="hidden",
    rate=1e-3,
    paper_setting="r = 512 beside the MLP with s = 4 (here r = 64), BART on summaries, rate 5e-5 (release's script).",
)
@dataclass(frozen=True)
class ParallelAdapter(Bottleneck):
    """See `core.method.bottleneck` for the options."""

    reads: ClassVar[Reads] = "input"
    scale: float = 4.0
