"""BAT: W guides its own change, block by block (Kang & Yin 2024, arXiv 2409.15371, versions 1-3 as "Bone").

    W in blocks W[a, c] of r × r, a < m/r, c < n/r:   W'[a, c] = W[a, c] (I + B[a]) + B[a]        axis="out" (PEFT)
                                                      W'[a, c] = W[a, c] (I + B[c]) + B[c]        axis="in" (RWKV-PEFT)

B (m/r or n/r, r, r) starts at zero. ΔW is linear in B and of full rank in general. The released code labels
both layouts "row", hence the name of the axis that indexes B. BAT adapters on one layer do not commute in the
paper; here every change is a function of the base alone, so the changes of several adapters add up in any
order.

axis="in" runs on activations, u_c = x_c B[c]ᵀ:  y = (x + u) Wᵀ + tile(Σ_c u_c). axis="out" forms W' and again
in backward.

Cost: m r (or n r) numbers a site, m n r multiply-adds a step (n r a token with axis="in"). r must divide m
and n. Not for tight time budgets: PEFT measured 1.57 times the step of MiSS, for 0.504 against 0.487 on
GSM8K.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "bat",
    title="BAT",
    paper="Kang & Yin 2024, arXiv:2409.15371",
    equation="ΔW[a, c] = W[a, c] B[a] + B[a], in blocks of r × r",
    hypothesis="The change is the pretrained weight seen through one small matrix for each strip of blocks.",
    family="block",
    rate=1e-3,
    published="PEFT's own benchmark, Llama-3.2-3B, GSM8K: BAT 0.504, MiSS 0.487, at 1.57 times the step. The "
    "paper's first abstract (49.36 on GSM8K with Llama-2-7B) is a result of this form, not of MiSS.",
    paper_setting="r = 64 on all linear layers, as here, rate 2e-5, batch 64, cosine.",
)
@dataclass(frozen=True)
class BAT(WeightMethod):
    """rank: the side r of the blocks. axis: whether B is indexed by the strip of outputs or of inputs."""

    rank: int = 64
    axis: Literal["out", "in"] = "out"

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"

    def check(self, m: int, n: int) -> str | None:
        return f"rank {self.rank} does not divide both of {m} × {n}" if m % self.rank or n % self.rank else None

    def has(self, hook: str) -> bool:
        return super().has(hook) and (hook != "apply" or self.axis == "in")

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        strips = W.shape[0 if self.axis == "out" else 1] // self.rank
        return {"B": nn.Parameter(torch.zeros(strips, self.rank, self.rank))}

    def delta(self, W: Tensor, p: Params) -> Tensor:
        (m, n), r, B = W.shape, self.rank, p["B"]
        blocks = W.reshape(m // r, r, n // r, r)  # a, i, c, k
        if self.axis == "out":
            change = torch.einsum("aick,akj->aicj", blocks, B) + B[:, :, None]
        else:
            change = torch.einsum("aick,ckj->aicj", blocks, B) + B.transpose(0, 1)
        return change.reshape(m, n)

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        strips = x.reshape(-1, x.shape[-1] // self.rank, self.rank).transpose(0, 1)
        u = (strips @ p["B"].to(x.dtype).transpose(1, 2)).transpose(0, 1)  # tokens, c, i
        y = base(x + u.reshape(x.shape))
        tile = u.sum(1).repeat(1, y.shape[-1] // self.rank)
        return y + tile.view(y.shape)

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m if self.axis == "out" else n)
