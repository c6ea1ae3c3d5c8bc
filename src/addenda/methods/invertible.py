"""Invertible adapters: the embeddings are changed, and the change is undone before the head (MAD-X, arXiv 2005.00052).

    e = (e1, e2):   o1 = e1 + F(e2),   o2 = e2 + G(o1)           after the embeddings
    o = (o1, o2):   e2 = o2 − G(o1),   e1 = o1 − F(e2)           before a language model's output embedding

with F and G bottlenecks U f(D u + b) + c on halves of the width (NICE, Dinh et al. 2015, arXiv 1410.8516). U and c
start at zero, so the start is exact. Used under a language adapter: what is special to a language's tokens is taken
off where they come in, and put on where they go out.

The place is the outermost module around the input embeddings that holds no block, with positions and norm where it
does them too. A head of several layers (BERT's) is undone right before its last one, as in the authors' library; files
of earlier versions, which undid before the whole head, keep their place. A model without a head over the vocabulary (a
classifier) gets no inverse, as in MAD-X. With an encoder and a decoder each has a coupling of its own at its
embeddings, and the decoder's is undone before the head.

Cost: 4 r d/2 + 2 (r + d/2) numbers in all. Two of them are to be stacked or split, never averaged: the inverse of a
mean is not the mean of the inverses.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.bottleneck import ACTIVATIONS
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.core.method.hidden import HiddenMethod


@register(
    "invertible",
    title="Invertible adapters (NICE)",
    paper="Pfeiffer et al. 2020, arXiv:2005.00052",
    equation="o1 = e1 + F(e2), o2 = e2 + G(o1) on the halves of the embeddings; undone before the head",
    hypothesis="Languages differ in their tokens by a bijection of the embedding space, and share what is between.",
    family="hidden",
    rate=1e-3,
    paper_setting="reduction 2 (here 4) beside a Pfeiffer adapter of reduction 16, trained by masked language "
    "modelling (its authors' library; the paper's sizes were not checked).",
)
@dataclass(frozen=True)
class Invertible(HiddenMethod):
    """rank: r, the width inside F and G; None: a quarter of the embeddings' width."""

    sized_by: ClassVar[str] = "rank"
    targets: ClassVar[str] = "embeddings"
    rank: int | None = None
    activation: Literal["relu", "gelu", "silu"] = "relu"

    def validate(self):
        if self.rank is not None and self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"

    def check(self, width: int) -> str | None:
        if width % 2 or width < 4:
            return f"a width of {width} has no two equal halves to couple"
        return f"rank {self.rank} is above half the width {width}" if (self.rank or 0) > width // 2 else None

    def _size(self, width: int) -> int:
        return width // 4 if self.rank is None else self.rank

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        r, half, own = self._size(width), width // 2, {}
        for k in "FG":
            own |= {f"{k}_down": rng.kaiming_uniform(r, half), f"{k}_up": torch.zeros(half, r)}
            own |= {f"{k}_down_bias": torch.zeros(r), f"{k}_up_bias": torch.zeros(half)}
        return {k: nn.Parameter(t) for k, t in own.items()}

    def _net(self, k: str, u: Tensor, p: Params) -> Tensor:
        D, b, U, c = (p[f"{k}_{name}"].to(u.dtype) for name in ("down", "down_bias", "up", "up_bias"))
        return F.linear(ACTIVATIONS[self.activation][0](F.linear(u, D, b)), U, c)

    def change(self, x: Tensor, y: Tensor, p: Params, training: bool = False) -> Tensor:
        e1, e2 = y.chunk(2, -1)
        o1 = e1 + self._net("F", e2, p)
        return torch.cat([o1, e2 + self._net("G", o1, p)], -1)

    def undo(self, y: Tensor, p: Params) -> Tensor:
        o1, o2 = y.chunk(2, -1)
        e2 = o2 - self._net("G", o1, p)
        return torch.cat([o1 - self._net("F", e2, p), e2], -1)

    def trainable(self, width: int) -> int:
        r, half = self._size(width), width // 2
        return 4 * r * half + 2 * (r + half)
