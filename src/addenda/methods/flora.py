"""FLoRA: the weight is scaled entry by entry, by a matrix of low rank (Wen & Chaudhuri 2023, arXiv 2312.05677).

    W' = W ∘ (B A)        y = Σ_k b_k ∘ W (a_k ∘ x),   b_k the columns of B (m × r), a_k the rows of A (r × n)

    x ─┬─ ∘ a_0 ── W ── ∘ b_0 ─┬─ + bias ── y       r passes through one shared W, scaled before and after: examples
       ├─ ∘ a_1 ── W ── ∘ b_1 ─┤                    with different a and b can share a batch, and every product in it
       └─ …                    ┘

The first component starts as ones, and it is trained as an offset from them, a_0 = 1 + A[0], b_0 = 1 + B[:, 0]: so
weight decay pulls towards the base, not towards a weight of zeros. The others start with a_k from N(0, 1), as large as
those ones, and b_k = 0. So the start is exact. The change, W ∘ (b_0 a_0 − 1 + …), may have full rank. Where W is 0 it
stays 0.

Traps: other methods share the name (federated FLoRA 2409.05976, gradient compression Flora 2402.03293). In bfloat16 an
a_0 within 2⁻⁹ of one is lost when it multiplies x. Two adapters on one layer add up; the paper has one an example.

Cost: r (m + n) numbers a site; r products with W a pass, where LoRA needs one and two thin ones. Not for ranks above a
few, and not for speed with a single adapter unless it is merged.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod, too_high


@register(
    "flora",
    title="FLoRA",
    paper="Wen & Chaudhuri 2023, arXiv:2312.05677",
    equation="W' = W ∘ (B A)",
    hypothesis="The change scales the pretrained entries, by factors that form a matrix of low rank.",
    family="dense",
    rate=3e-3,
    paper_setting="code generation in 8 languages and speech in 6, each example with an adapter of its own "
    "(abstract); its ranks were not checked (here 2).",
)
@dataclass(frozen=True)
class FLoRA(WeightMethod):
    """rank: how many times x passes through W."""

    sized_by: ClassVar[str] = "rank"
    elementwise: ClassVar[bool] = True
    rank: int = 2

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.bits is not None:
            yield "bits is not for it: one row of A stays near 0 beside rows of N(0, 1), and codes have one size"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        A = torch.cat([torch.zeros(1, n), rng.normal(self.rank - 1, n)])
        return {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(m, self.rank))}

    def delta(self, W: Tensor, p: Params) -> Tensor:
        A, B = p["A"], p["B"]
        return W * (B @ A + B[:, :1] + A[:1])  # (1 + b)(1 + a) − 1, without the difference of large numbers

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        A, B = p["A"].to(x.dtype), p["B"].to(x.dtype)

        def unbiased(y: Tensor) -> Tensor:
            return y if base.bias is None else y - base.bias

        y = base(torch.addcmul(x, x, A[..., 0, :]))
        y = torch.addcmul(y, unbiased(y), B[..., 0])
        for k in range(1, self.rank):
            y = torch.addcmul(y, unbiased(base(x * A[..., k, :])), B[..., k])
        return y

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n)
