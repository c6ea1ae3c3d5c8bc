"""OFT: W turns as a whole, W' = W Rᵀ with R orthogonal (Qiu et al. 2023, arXiv 2306.07280).

    R = blockdiag(R_1 … R_{n/b}),  R_i = (I − Q_i)(I + Q_i)⁻¹,  Q_i skew-symmetric, 0 at the start

On activations it is y = (x R) Wᵀ: the input is rotated, then the unchanged layer runs. Row norms, singular values and
the angles between rows stay what they were. The Cayley map is computed exactly, by a solve. With `terms=k` the inverse
is a Neumann series instead (Qiu et al. 2025, arXiv 2506.19847), and R_i a polynomial of k terms:

    R_i ≈ (I − Q)(I − Q + Q² − … ± Q^{k−2}) = I − 2Q + 2Q² − … ± Q^{k−1},   off by exactly R_i (−Q)^{k−1}

Only matrix products then, but orthogonal only while ‖Q‖ is small, and divergent from ‖Q‖ = 1 on.

Trap: PEFT's default (5 terms) expands (I + Q)(I − Q)⁻¹, the transposed rotation, while its exact branch is the form
here: there the same numbers mean two rotations. Here any number of terms tends to the exact one. Cost: n (b − 1) / 2
numbers; n b multiply-adds a token. Needs b to divide n. Cannot scale anything.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import cayley, skew_symmetric
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod

MOST_TERMS = 100  # a series that has not converged by then does not


@register(
    "oft",
    title="OFT",
    paper="Qiu et al. 2023, arXiv:2306.07280",
    equation="W' = W Rᵀ, R = blockdiag(Cayley(Q_i))",
    hypothesis="The pretrained angles between neurons are right; a task only needs its inputs turned.",
    family="rotation",
    rate=1e-2,
    published="PEFT's own benchmark, Llama-3.2-3B, GSM8K: OFT 0.491, LoRA r = 32 0.478, full fine-tuning 0.472.",
    paper_setting="Stable Diffusion: attention layers cut into 4 blocks, whatever their width (here blocks of 32, "
    "every linear layer).",
)
@dataclass(frozen=True)
class OFT(WeightMethod):
    """block: the side b of the square blocks. block_share: one block for all of a site. terms: 0 is exact."""

    sized_by: ClassVar[str] = "block"
    block: int = 32
    block_share: bool = False
    terms: int = 0

    def validate(self):
        if self.block < 2:
            yield f"block must be at least 2, got {self.block}"
        if self.terms < 0 or self.terms in (1, 2):
            yield f"terms must be 0 (exact) or at least 3 (I − 2Q + Q²), got {self.terms}"
        if self.terms > MOST_TERMS:
            yield f"terms must be at most {MOST_TERMS}, each a product in every pass; 0 is exact, got {self.terms}"

    def check(self, m: int, n: int) -> str | None:
        return f"block={self.block} does not divide the input width {n}" if n % self.block else None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        blocks = 1 if self.block_share else W.shape[1] // self.block
        return {"skew": nn.Parameter(torch.zeros(blocks, self.block * (self.block - 1) // 2))}

    def _rotation(self, p: Params) -> Tensor:
        """R_i as (n/b or 1, b, b), in the dtype of the parameters, float32 at least."""
        Q = skew_symmetric(p["skew"], self.block)
        if not self.terms:
            return cayley(Q)
        eye = torch.eye(self.block, dtype=Q.dtype, device=Q.device)
        inverse = eye - Q
        for _ in range(self.terms - 3):
            inverse = eye - Q @ inverse
        return inverse - Q @ inverse

    def _turn(self, x: Tensor, R: Tensor) -> Tensor:
        """x (…, n) with every block of b entries multiplied by its R_i from the right."""
        blocks = x.reshape(-1, x.shape[-1] // self.block, self.block).transpose(0, 1)
        return (blocks @ R).transpose(0, 1).reshape(x.shape)

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        return base(self._turn(x, self._rotation(p).to(x.dtype)))

    def effective(self, W: Tensor, p: Params) -> Tensor:
        return self._turn(W, self._rotation(p).transpose(1, 2))

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self.effective(W, p) - W

    def trainable(self, m: int, n: int) -> int:
        return (1 if self.block_share else n // self.block) * self.block * (self.block - 1) // 2
