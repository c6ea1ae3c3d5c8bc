"""OFT: W turns as a whole, W' = W Rᵀ with R orthogonal (Qiu et al. 2023, arXiv 2306.07280).

    R = blockdiag(R_1 … R_{n/b}),  R_i = (I − Q_i)(I + Q_i)⁻¹,  Q_i skew-symmetric, 0 at the start

The Cayley map is computed exactly, by a solve. On activations it is y = (x R) Wᵀ: the input is rotated, then the
unchanged layer runs. Row norms, singular values and the angles between rows stay what they were.

Trap: PEFT's default (a Neumann series) approximates the transposed rotation for the same parameters; the form here is
its exact branch. Cost: n (b − 1) / 2 numbers; n b products a token. Needs b to divide n. Cannot scale anything.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.method import Base, Params, WeightMethod
from addenda.core.random import Stream
from addenda.core.registry import register


@register(
    "oft",
    title="OFT",
    paper="Qiu et al. 2023, arXiv:2306.07280",
    equation="W' = W Rᵀ, R = blockdiag(Cayley(Q_i))",
    hypothesis="The pretrained angles between neurons are right; a task only needs its inputs turned.",
    family="rotation",
    rate=1e-2,
)
@dataclass(frozen=True)
class OFT(WeightMethod):
    """block: the side b of the square blocks. shared: one block for all of a site."""

    sized_by: ClassVar[str] = "block"
    block: int = 32
    block_share: bool = False

    def validate(self):
        if self.block < 2:
            yield f"block must be at least 2, got {self.block}"

    def check(self, m: int, n: int) -> str | None:
        return f"block={self.block} does not divide the input width {n}" if n % self.block else None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        blocks = 1 if self.block_share else W.shape[1] // self.block
        return {"skew": nn.Parameter(torch.zeros(blocks, self.block * (self.block - 1) // 2))}

    def rotation(self, p: Params) -> Tensor:
        """R_i as (n/b or 1, b, b), in the dtype of the parameters, float32 at least."""
        skew, b = p["skew"], self.block
        skew = skew.to(torch.promote_types(skew.dtype, torch.float32))  # no solve in half precision
        row, column = torch.triu_indices(b, b, 1, device=skew.device)
        Q = skew.new_zeros(len(skew), b, b)
        every = torch.arange(len(skew), device=skew.device)[:, None]
        Q = Q.index_put((every, row, column), skew)
        Q = Q - Q.transpose(1, 2)
        eye = torch.eye(b, dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye + Q, eye - Q)  # (I + Q)⁻¹ and (I − Q) commute

    def _turn(self, x: Tensor, R: Tensor) -> Tensor:
        """x (…, n) with every block of b entries multiplied by its R_i from the right."""
        blocks = x.reshape(-1, x.shape[-1] // self.block, self.block).transpose(0, 1)
        return (blocks @ R).transpose(0, 1).reshape(x.shape)

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        return base(self._turn(x, self.rotation(p).to(x.dtype)))

    def effective(self, W: Tensor, p: Params) -> Tensor:
        return self._turn(W, self.rotation(p).transpose(1, 2))

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self.effective(W, p) - W

    def trainable(self, m: int, n: int) -> int:
        return (1 if self.block_share else n // self.block) * self.block * (self.block - 1) // 2
