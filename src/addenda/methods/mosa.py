"""MoSA: a bottleneck adapter trained as a mixture of sparse ones (Zhang et al. 2023, arXiv 2312.02923).

    y' = y + s (U f(D x + b) + c)      U = M_k ∘ V in training, V/N otherwise; k from 1 … N, drawn anew every step

    x ── D (r × d) ── f ── M_k ∘ V (d × r) ── · s ──┐      V from 0; D, b and c whole, shared by all modules
    y ──────────────────────────────────────────────┴── y'

The entries of V are dealt to N disjoint modules (see `core.method.mixture`), and every place draws one of them a step.
After training the mean over all draws acts, V/N, which is an adapter of the original size:
`addenda.exporting.mixture.export` makes it one of the plain method. merge="concat" puts the modules together without
the 1/N: N times what training saw. share="up" deals out D instead, and share="none" both, with a draw each: D = D0 +
M_k ∘ V, whose mean is D0 + V/N. With parts=1 it is the plain adapter, bit for bit.

Forms, with what their plain adapters have: "mosa" as AdaptFormer, "mosa-pfeiffer", "mosa-houlsby"; `mosl` is the LoRA.
The released code trains N whole copies, each with biases of its own. Its places are

    AdaptFormer    "mosa:activation=gelu,dropout=0.1,norm=true"     reads the stream before the norm, as here
    Houlsby        "mosa-houlsby:reads=stream"                      the stream behind each sum; here each part's output
    Pfeiffer       "mosa-pfeiffer:reads=output,norm=true"           the MLP's output before the sum; here the sum

and what the defaults here have is what the adapters of these names read in their own papers. It also adds a consistency
term, the symmetric KL divergence between two forwards with different draws: `tune --consistency 1`.

What moves in a step: the drawn entries of V alone, which "partwise-adamw" sees to. Plain AdamW would move the others
too, by momentum and weight decay. Shared tensors move in every step.

Cost: 2 d r + r + d numbers a place, one byte more for each entry that is dealt out; a step costs the plain adapter's
and a few passes over V. With the consistency term, two forwards and backwards. Not without a look at the dense adapter:
the term helps that one too where the model has dropout.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from addenda.core.method.bottleneck import Bottleneck
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.core.method.mixture import Parted

PAPER = "Zhang et al. 2023, arXiv:2312.02923"
CLAIM = "Much of an adapter repeats itself: disjoint parts of it, each trained alone, together know more."


@dataclass(frozen=True)
class Mixture(Parted, Bottleneck):
    """See `core.method.mixture` and `core.method.bottleneck` for the options."""

    def shapes(self, site: int) -> dict[str, tuple[int, int]]:
        return {"down": (self.rank, site), "up": (site, self.rank)}

    def matrices(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.acting("down", p), self.acting("up", p)


@register(
    "mosa",
    title="MoSA (AdaptFormer)",
    paper=PAPER,
    equation="h' = h + MLP(LN(h)) + s (U f(D h + b) + c), U = M_k ∘ V, k drawn every step",
    hypothesis=CLAIM,
    family="hidden",
    rate=3e-2,  # chosen in records/recipes/mosa wherever the examples were enough to choose by
    paper_setting="release: gelu, dropout=0.1, norm=True (here relu, 0, False); r = 64 or 16 by data set, 4 parts, "
    "the consistency term.",
)
@dataclass(frozen=True)
class MoSA(Mixture):
    """parts: N. share, merge: see the module. reads: the residual stream before the norm, or the MLP's own input."""

    scale: float = 0.1
    reads: Literal["residual", "input"] = "residual"


@register(
    "mosa-pfeiffer",
    title="MoSA (Pfeiffer)",
    paper=PAPER,
    equation="s' = s + U f(D LN(s) + b) + c, s = MLP + residual, then LN again; U = M_k ∘ V, k drawn every step",
    hypothesis=CLAIM,
    family="hidden",
    paper_setting="release (reads=output,norm=true): reads the MLP's output before the sum, through a LayerNorm of "
    "the adapter's own (here the sum, as Pfeiffer's); relu, r = 64 or 16, 4 parts, as here.",
)
@dataclass(frozen=True)
class MoSAPfeiffer(Mixture):
    """parts: N. share, merge, reads: see the module. Others: see `core.method.bottleneck`."""

    reads: Literal["sum", "output"] = "sum"


@register(
    "mosa-houlsby",
    title="MoSA (Houlsby)",
    paper=PAPER,
    equation="o' = o + U f(D o + b) + c, after attention and after the MLP; U = M_k ∘ V, k drawn every step",
    hypothesis=CLAIM,
    family="hidden",
    paper_setting="release (reads=stream): reads and changes the stream behind each sum, after attention "
    "and after the MLP (here each part's output before it); silu, r = 64 or 16, 4 parts, as here.",
)
@dataclass(frozen=True)
class MoSAHoulsby(Mixture):
    """parts: N. share, merge, reads: see the module. Others: see `core.method.bottleneck`."""

    targets: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    activation: Literal["relu", "gelu", "silu"] = "silu"
    reads: Literal["output", "stream"] = "output"
