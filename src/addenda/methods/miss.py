"""MiSS, first called Bone: one block D shared by all groups of the input (Kang & Yin 2024, arXiv 2409.15371).

    S = Σ_j x[…, j r : (j+1) r]  (the last group padded with zeros)      y = x Wᵀ + S D      D (r × m), from 0

    ΔW = Dᵀ T,   T = [I_r I_r … I_r] cut to n columns (r × n)

So MiSS is a LoRA whose A is frozen to a tiled identity: rank at most r, no scale, and no input to keep for
backward. With `mini=q`, D is r × q and serves m/q groups of outputs as well.

Names: versions 1-3 of the paper call BAT "Bone", 4-5 call this one "Bone", 12 calls it "MiSS". The worked
example of version 12 groups neighbours; its formula and every implementation group entries r apart, as here.
Published learning rates (2e-5 for all methods) are too low for the LoRA beside them: tune each.

Cost: r m numbers a site (r q); r (m + n) multiply-adds a token. Not for changes that must tell
apart inputs that are a multiple of r apart: those are always added up.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod


@register(
    "miss",
    title="MiSS (Bone)",
    paper="Kang & Yin 2024, arXiv:2409.15371",
    equation="ΔW = Dᵀ [I_r … I_r]",
    hypothesis="The change needs no input directions of its own: sums over groups of inputs carry enough.",
    family="block",
    rate=3e-4,
    published="Llama-2-7B at one rate for all methods (2e-5, low for LoRA), GSM8K / MATH: LoRA 40.75 / 5.22, PiSSA "
    "43.89 / 6.92, MiSS 48.16 / 8.58 with 87 M numbers (paper, v12). PEFT's own benchmark, Llama-3.2-3B, "
    "GSM8K: MiSS r = 64 0.487, LoRA r = 32 0.478, full fine-tuning 0.472.",
    paper_setting="r = 64 on all linear layers, as here, rate 2e-5, batch 64, cosine; the same rate for all that it "
    "is compared with.",
)
@dataclass(frozen=True)
class MiSS(WeightMethod):
    """rank: the width r of a group of inputs. mini: D has this many columns, repeated to the m outputs."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 64
    mini: int | None = None

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.mini is not None and self.mini < 1:
            yield f"mini must be at least 1, got {self.mini}"

    def check(self, m: int, n: int) -> str | None:
        if self.rank > n:
            return f"rank {self.rank} is above the input width {n}"
        if self.mini is not None and m % self.mini:
            return f"mini={self.mini} does not divide the output width {m}"
        return None

    def shared(self, shapes: list[Shape], rng: Stream) -> Params:
        widest = max(n for _, n in shapes)
        return {"T": torch.eye(self.rank).repeat(1, -(-widest // self.rank))}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"D": nn.Parameter(torch.zeros(self.rank, self.mini or W.shape[0]))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        m, n = shape
        D = p["D"] if self.mini is None else p["D"].repeat(1, m // self.mini)
        return Factors(D.T, p["T"][:, :n], sums=True)

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (self.mini or m)
