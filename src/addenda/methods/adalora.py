"""AdaLoRA: a LoRA with a diagonal in its middle, by which ranks are taken away (Zhang et al. 2023, arXiv 2303.10512).

    ΔW = s B diag(E) A,   s = α/r        A (r × n), B (m × r) from N(0, 0.02²);  E (r) from 0

    x (…, n) ── A ── ∘ s E ── B ──┐
         └─────── W (m × n) ──────┴── y

E plays the part of singular values: where E_i is 0, the i-th triplet does nothing, and it comes back if E_i is moved
again. This file is the form alone. What makes it adaptive is how it is trained, `trained_by`: a penalty that keeps
the rows of A and the columns of B orthonormal, and a budget for all sites together that falls from rank to target_rank
a site, while the triplets of least importance get E_i = 0. Under a plain optimizer it is a LoRA of a fixed rank that
starts slowly: at the first step only E has a gradient, of the size of 0.02².

The scale is α/r with the initial rank r throughout, as in PEFT (which adds 1e-5 to r). PEFT's default of alpha is 8;
None means alpha = rank here.

Cost: r (m + n + 1) numbers a site, two rank-r products a pass, whatever the budget leaves of them. Not where all sites
need the same rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, too_high
from addenda.core.method.lowrank import Ranked


@register(
    "adalora",
    title="AdaLoRA",
    paper="Zhang et al. 2023, arXiv:2303.10512",
    equation="ΔW = (α/r) B diag(E) A, the least important E_i set to 0 while training",
    hypothesis="The change has low rank, but some weights need more of it than others.",
    family="low-rank",
    rate=3e-3,
    published="DeBERTaV3, GLUE: full fine-tuning 88.09, LoRA r = 8 88.34, AdaLoRA 89.31 with 1.27 M numbers "
    "(paper). PEFT's own benchmark, Llama-3.2-3B, GSM8K: AdaLoRA 0.373, LoRA r = 32 0.478.",
    paper_setting="DeBERTaV3: from 1.5 times the target rank to it, as here, target ranks of 2, 4 and 8 a layer, on "
    "all linear layers, beside a penalty of orthogonality of weight 0.1 to 0.5 (paper, §4.1).",
)
@dataclass(frozen=True)
class AdaLoRA(Ranked):
    """rank: at the start. target_rank: what a site keeps on average. alpha: None means alpha = rank (scale 1)."""

    rank: int = 12
    target_rank: int = 8
    dropout: float = 0.0

    def validate(self):
        yield from super().validate()
        if not 1 <= self.target_rank <= self.rank:
            yield f"1 <= target_rank <= rank must hold, got target_rank={self.target_rank}, rank={self.rank}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    @property
    def trained_by(self) -> str:
        return "adalora"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {
            "A": nn.Parameter(rng.normal(self.rank, n, std=0.02)),
            "B": nn.Parameter(rng.normal(m, self.rank, std=0.02)),
            "E": nn.Parameter(torch.zeros(self.rank)),
        }

    def factors(self, p: Params, shape: Shape) -> Factors:
        return Factors(p["B"], p["A"], p["E"] * self.scale)

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n + 1)
