"""MoSL: a LoRA trained as a mixture of sparse ones, the LoRA form of MoSA (Zhang et al. 2023, arXiv 2312.02923).

    ΔW = s B A,   B = M_k ∘ V in training, V/N otherwise;  k from 1 … N, drawn anew every step at every site

    A (r × n)  Kaiming-uniform, whole, shared by all modules      V (m × r) from 0, its entries dealt to N modules

The mean over all draws, V/N, acts after training, in merges and in exports (`addenda.exporting.mixture.export` makes a
plain LoRA of it); merge="concat" leaves the 1/N out. share="up" deals out A instead, A = A0 + M_k ∘ V, and share="none"
both, with a draw each. With parts=1 it is LoRA, bit for bit. Dropout acts on the input of the additive path. Draws, the
optimizer that leaves alone what was not drawn, and the consistency term: as in MoSA.

Cost: r (m + n) numbers a site, one byte more for each entry that is dealt out; two rank-r products a pass, as LoRA.
Published on query and value with r = 16. Not where a LoRA of this rank does not overfit.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import FactorPair, Factors, Params, Shape
from addenda.core.method.lowrank import LowRank
from addenda.core.method.mixture import Parted


@register(
    "mosl",
    title="MoSL",
    paper="Zhang et al. 2023, arXiv:2312.02923",
    equation="ΔW = (α/r) B A, B = M_k ∘ V, k drawn every step",
    hypothesis="Much of a LoRA repeats itself: disjoint parts of it, each trained alone, together know more.",
    family="low-rank",
    rate=3e-3,
    paper_setting="query and value of a ViT, r = 16, with the consistency term (here r = 8, every linear layer).",
)
@dataclass(frozen=True)
class MoSL(Parted, LowRank):
    """parts: N. share, merge: see the module. alpha: None means alpha = rank (scale 1)."""

    thin: ClassVar[tuple[str, str]] = ("A", "B")

    def shapes(self, site: Tensor) -> dict[str, tuple[int, int]]:
        m, n = site.shape
        return {"A": (self.rank, n), "B": (m, self.rank)}

    def init(self, site: Tensor, rng: Stream, p: Params) -> Params:
        own = super().init(site, rng, p)
        return own if "A" in self.split else own | {"A": nn.Parameter(rng.kaiming_uniform(self.rank, site.shape[1]))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        return super().factors(p | {name: self.acting(name, p) for name in self.thin}, shape)

    def pair(self, p: Params) -> FactorPair | None:
        return super().pair(p) if not self.split else None  # what is dealt out is no plain factor
