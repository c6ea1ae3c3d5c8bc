"""One serial adapter a block, around the sum with the residual (Pfeiffer et al. 2020, arXiv 2005.00052, 2005.00247).

    a = LN(o + h),   h' = LN((o + U f(D a + b) + c) + h)      models that normalise after the sum (BERT)
    a = o + h,       h' =  a + U f(D a + b) + c               models that normalise before their parts

o: what the MLP returns; h: the residual; LN: the model's own LayerNorm, which runs twice. The skip connection of the
adapter is o as it was before the norm, so with s = o + h the change is of s alone: h' = LN(s + Δ(LN(s))). It therefore
lives at the LayerNorm (`A@again`), and where there is none behind the sum, at the block's output.

reads="output" changes and reads o alone, before the sum: o' = o + U f(D o + b) + c. With norm=True that is what the
release of MoSA has under Pfeiffer's name.

Cost: 2 d r + r + d numbers a block, half of Houlsby's, and one more LayerNorm where it runs twice. Starts exactly:
U = 0. Trap: two of them switched on together act one after the other on s; MAD-X's second one reads the first, but
skips from o alone.
"""

from dataclasses import dataclass
from typing import Literal

from addenda.core.method.bottleneck import Bottleneck
from addenda.core.method.catalogue import register


@register(
    "pfeiffer",
    title="Bottleneck adapters (Pfeiffer)",
    paper="Pfeiffer et al. 2020, arXiv:2005.00247",
    equation="s' = s + U f(D LN(s) + b) + c, s = MLP + residual, then LN again",
    hypothesis="One small non-linear correction a block is enough, where the block's result is put together.",
    family="hidden",
    rate=1e-3,
    paper_setting="a reduction factor of 16: a bottleneck of width/16 (48 at 768; here 64) (its authors' library).",
)
@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """reads: the sum with the residual, or what the MLP returns. Others: see `core.method.bottleneck`."""

    reads: Literal["sum", "output"] = "sum"
