"""DoRA: each row of W turns by a low-rank change and gets a length of its own (Liu et al. 2024, arXiv 2402.09353).

    V = W + s B A,   W' = diag(c) V,   c_i = (‖W_i‖ + d_i) / ‖V_i‖,   ‖V_i‖ held constant in backward

    A (r × n)  Kaiming-uniform     B (m × r)  zeros     d (m)  zeros: the trained magnitude minus its start ‖W_i‖

The paper writes column norms of a d × k weight; in torch's layout that is one norm for each output row, as in
the released code and PEFT. The magnitude is trained as an offset: the gradients are the same, and c is
exactly 1 at the start, because ‖V_i‖ is found as the square root of ‖W_i‖² + 2s (W Aᵀ ∘ B) 1 + s² (B A Aᵀ ∘
B) 1, whose last two terms are then 0. So the m × n matrix V is never formed, and the start is the base bit
for bit. ‖W_i‖ is that of the W of now, also where the base trains beside the change. (Weight decay pulls the
offset to 0, the magnitude to its start; decay of the paper's magnitude pulls rows to 0.) Rows of zeros are safe.

Cost: r (m + n) + m numbers a site. Beyond LoRA: m n r multiply-adds a step for W Aᵀ, whatever the batch, and
one output-sized tensor kept for backward. Not for decoding one token at a time without merging first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, too_high
from addenda.core.method.lowrank import Ranked


@register(
    "dora",
    title="DoRA",
    paper="Liu et al. 2024, arXiv:2402.09353",
    equation="W' = diag(magnitude / ‖W + s B A‖_row) (W + s B A)",
    hypothesis="The directions of the rows change at low rank, and their lengths should change independently.",
    family="low-rank",
    rate=3e-3,
    published="LLaMA-7B, mean of 8 commonsense tasks: LoRA 74.7, DoRA 78.4 (paper). PEFT's own benchmark, "
    "Llama-3.2-3B, GSM8K: DoRA r = 32 0.469, LoRA r = 32 0.478.",
    paper_setting="r = 32 with α = 64, or r = 16 with α = 32 (here r = 8, s = 1), on q, k, v, up and down, dropout "
    "0.05, rates of 1e-4 and 2e-4 (release's README).",
)
@dataclass(frozen=True)
class DoRA(Ranked):
    """alpha: None means alpha = rank, the scale s = alpha / rank is then 1."""

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        return {"square": W.square().sum(1)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {
            "A": nn.Parameter(rng.kaiming_uniform(self.rank, n)),
            "B": nn.Parameter(torch.zeros(m, self.rank)),
            "magnitude": nn.Parameter(torch.zeros(m)),
        }

    def delta(self, W: Tensor, p: Params) -> Tensor:
        c = self.magnitude(W, p)[:, None]
        return (c - 1) * W + (c * self.scale * p["B"]) @ p["A"]

    def factors(self, p: Params, shape: Shape) -> Factors:
        return Factors(p["B"], p["A"], None if self.scale == 1 else p["A"].new_full((self.rank,), self.scale))

    def magnitude(self, W: Tensor, p: Params) -> Tensor:
        """c (m): differentiable in the magnitude only."""
        with torch.no_grad():
            A, B, square, s = p["A"], p["B"], self._square(W, p), self.scale
            tiny = torch.finfo(square.dtype).tiny
            cross = ((W @ A.to(W.dtype).T).to(B.dtype) * B).sum(1)
            gram = ((B @ (A @ A.T)) * B).sum(1)
            norm = (square + 2 * s * cross + s * s * gram).clamp_min(tiny).sqrt()
            start = square.clamp_min(tiny).sqrt()
        return (start + p["magnitude"]) / norm

    def _square(self, W: Tensor, p: Params) -> Tensor:
        """‖W_i‖² (m): that of the start, or where the base trains too, of the W of now, by which c divides."""
        if not W.requires_grad:
            return p["square"]
        wide = torch.promote_types(W.dtype, p["square"].dtype)
        return torch.linalg.vector_norm(W, dim=1, dtype=wide).square().to(p["square"].dtype)

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n) + m
