"""VB-LoRA: low-rank factors mixed from one bank of vectors that all sites train (Li et al. 2024, arXiv 2405.15179).

    ΔW = B A;   the rows of A (r × n) and the columns of B (m × r) are cut into pieces of length b, and

    piece = Σ_j w_j bank_j   over the k largest of its h logits,   w = the softmax of these k

    logits a (r × n/b × h) ── top-k ──┬── A ──┐
             bank (h × b)  ───────────┤       ├── ΔW        one bank, trained by every site; logits of each site's own
    logits b (m/b × r × h) ── top-k ──┴── B ──┘

Which vectors a piece takes is chosen anew in every pass. The choice has no gradient; the weights of what was chosen
have one, and so has the bank. As in PEFT the bank starts uniform in ±0.02 and the logits at N(0, 0.1²): the paper's
N(0, 0.01), with 0.01 as the variance. Neither factor can be zero, so the start is only near the base: entries of ΔW are
at most 0.02² r and, with the defaults, of a size of 1.3e-4.

The paper asks for a b that divides m and n, and PEFT refuses others. Here the last piece of a row is cut where the row
ends; where b divides, that is the same. As in the paper, whose rates are 1e-2 and 1e-3, `pooled-adamw` trains the bank
at a tenth of the logits' rate.

Cost: h r numbers for b inputs or outputs of a site, and h b once, with gradient and moments; two rank-r products a
pass. With h = b as many are trained as by a LoRA of this rank. The paper's small counts are those of a file that keeps
k indices and weights for each piece; here it keeps the logits, so that training can go on. Not where that file must be
small.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, Start, WeightMethod, too_high

BOUND, STD = 0.02, 0.1  # of the bank's uniform start, of the logits' normal one


@register(
    "vb-lora",
    title="VB-LoRA",
    paper="Li et al. 2024, arXiv:2405.15179",
    equation="ΔW = B A, their pieces top-k mixtures of a bank that all sites train",
    hypothesis="Low-rank changes are made of the same few short vectors, whatever the layer and the place in it.",
    family="low-rank",
    rate=1e-2,
    published="RoBERTa-base, 6 tasks of GLUE: LoRA 86.6 with 0.295 M numbers, VeRA 85.2 with 0.043 M, VB-LoRA 85.4 "
    "with 0.023 M (query and value) and 85.7 with 0.027 M (all layers), as stored, not as trained (paper, table 1, "
    "whose row of LoRA is copied from LoRA's paper). PEFT's own benchmark, Llama-3.2-3B, GSM8K: VB-LoRA 0.334, LoRA "
    "r = 32 0.478.",
    paper_setting="r = 4 and 2 of the vectors, as here: RoBERTa with a bank of 90 vectors of 256, Llama-2, Mistral "
    "and Gemma with 2048 (here 256), query and value or all layers, the bank at 1e-3 and the logits at 1e-2 "
    "(release's scripts).",
)
@dataclass(frozen=True)
class VBLoRA(WeightMethod):
    """vectors, length: the bank's, h and b. topk: how many of them a piece mixes."""

    sized_by: ClassVar[str] = "vectors"
    rank: int = 4
    vectors: int = 256
    length: int = 256
    topk: int = 2
    dropout: float = 0.0

    def validate(self):
        for option in ("rank", "vectors", "length", "topk"):
            if getattr(self, option) < 1:
                yield f"{option} must be at least 1, got {getattr(self, option)}"
        if self.topk > self.vectors:
            yield f"topk={self.topk} is more than there are vectors ({self.vectors})"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    @property
    def trained_by(self) -> str:
        return "pooled-adamw"

    @property
    def starts(self) -> Start:
        most = self.rank * BOUND**2
        why = f"neither factor can be zero: entries of ΔW up to {most:.1g}, where those of W are 0.01 or more"
        return Start(min(1.0, 100 * most), why)

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def _pieces(self, width: int) -> int:
        """How many pieces a row of this width has."""
        return -(-width // self.length)

    def pool(self, shapes: list[Shape], rng: Stream) -> Params:
        return {"bank": nn.Parameter(rng.uniform(self.vectors, self.length, low=-BOUND, high=BOUND))}

    def pooled(self, shapes: list[Shape]) -> int:
        return self.vectors * self.length

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = (self._pieces(width) for width in W.shape)
        return {
            "a": nn.Parameter(rng.normal(self.rank, n, self.vectors, std=STD)),
            "b": nn.Parameter(rng.normal(m, self.rank, self.vectors, std=STD)),
        }

    def _mix(self, logits: Tensor, bank: Tensor) -> Tensor:
        """(…, b) from logits (…, h) and the bank (h × b)."""
        best, index = logits.topk(self.topk, dim=-1)
        return (best.softmax(-1)[..., None] * bank[index]).sum(-2)

    def factors(self, p: Params, shape: Shape) -> Factors:
        m, n = shape
        A = self._mix(p["a"], p["bank"]).flatten(1)[:, :n]
        B = self._mix(p["b"], p["bank"]).transpose(1, 2).flatten(0, 1)[:m]
        return Factors(B, A)

    def trainable(self, m: int, n: int) -> int:
        return self.rank * self.vectors * (self._pieces(m) + self._pieces(n))
