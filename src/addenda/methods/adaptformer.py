"""Adapters beside the MLP that read the residual stream (Chen et al. 2022, arXiv 2205.13535).

    h' = h + MLP(LN(h)) + s (U relu(D h + b) + c)      h: the residual stream, not normalised

with s = 0.1 and r = 64. This is the release's form, with dropout=0.1 behind the relu and, by choice, norm=True, a
LayerNorm of the adapter's own in front. The paper's equation reads what the MLP reads, LN(h): reads="input". In models
that normalise after the sum, what the MLP reads *is* the residual stream.

Cost: 2 d r + r + d numbers a block. The residual stream's size differs from model to model, and with it the right s:
the 1-bit adapters that build on it search s from 0.01 to 100 for every data set. Not for use without a search over s or
the learning rate.
"""

from dataclasses import dataclass
from typing import Literal

from addenda.core.method.bottleneck import Bottleneck
from addenda.core.method.catalogue import register


@register(
    "adaptformer",
    title="AdaptFormer",
    paper="Chen et al. 2022, arXiv:2205.13535",
    equation="h' = h + MLP(LN(h)) + s (U relu(D h + b) + c)",
    hypothesis="A task adds a few neurons to each MLP that read the stream itself, magnitude included.",
    family="hidden",
    rate=3e-3,
    paper_setting="r = 64 and s = 0.1, as here. The paper's figure reads the input of the MLP's block; the form "
    "here, reading the stream before the norm, is the release's, which has dropout 0.1 (here 0) and "
    "an optional LayerNorm (norm=True).",
)
@dataclass(frozen=True)
class AdaptFormer(Bottleneck):
    """reads: the residual stream before the norm, or the MLP's own input. Others: see `core.method.bottleneck`."""

    scale: float = 0.1
    reads: Literal["residual", "input"] = "residual"
