"""MoRA: one square matrix between fixed ways down and up (Jiang et al. 2024, arXiv 2405.12130).

    Δy = up(M down(x)),   M: r̂ × r̂, from zero,   r̂ = ⌊√((m + n) r)⌋: as many numbers as a LoRA of rank r

The input is cut into groups of r̂, the last one filled up with the first entries again.

    form="sharing":   down adds the groups up; up repeats the r̂ results to the m outputs
    form="rotation":  down turns group g by g times fixed angles, as RoPE does; M serves every group, and up lines the
                      results up, cut to m outputs or repeated to them: ΔW is block-diagonal before the cut

The code takes rotation for small ranks and sharing for large ones. Start: M = 0, exact. r̂ is at most m and n, and even
for rotation. The code rounds the square root, the paper cuts it off, as here. No scale α, as in the code.

Trap: with rotation, where n is well above m, the cut leaves inputs beyond the m-th without any effect.

Cost: about r (m + n) numbers a site; r̂² multiply-adds a token (n r̂ for rotation). Not for changes that must tell
apart inputs r̂ apart (sharing), or that mix far inputs (rotation).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "mora",
    title="MoRA",
    paper="Jiang et al. 2024, arXiv:2405.12130",
    equation="Δy = up(M down(x)), M square",
    hypothesis="New knowledge needs rank more than it needs chosen directions: spend the numbers on one square matrix.",
    family="block",
    rate=1e-3,
    paper_setting="all linear layers, rotation for small ranks and sharing (form='sharing') for large ones; r = 8 "
    "with rotation, as here, at 3e-4 for mathematics (release's README; the paper's tables were not checked).",
)
@dataclass(frozen=True)
class MoRA(WeightMethod):
    """rank: that of a LoRA with as many numbers. form: see the module."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 8
    form: Literal["sharing", "rotation"] = "rotation"

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"

    def _side(self, m: int, n: int) -> int:
        """r̂."""
        side = min(math.isqrt((m + n) * self.rank), m, n)
        return side - side % 2 if self.form == "rotation" else side

    def check(self, m: int, n: int) -> str | None:
        return None if self._side(m, n) else f"form='rotation' turns pairs, and {m} × {n} has none"

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        side = self._side(*W.shape)
        return {"M": nn.Parameter(torch.zeros(side, side))}

    def _change(self, x: Tensor, M: Tensor, m: int) -> Tensor:
        """Δy (…, m) of x (…, n)."""
        missing = -x.shape[-1] % len(M)
        x = torch.cat([x, x[..., :missing]], -1) if missing else x
        groups = x.unflatten(-1, (-1, len(M)))
        down = groups.sum(-2, keepdim=True) if self.form == "sharing" else _turned(groups)
        y = F.linear(down, M.to(x.dtype)).flatten(-2)
        return torch.cat([y] * -(-m // y.shape[-1]), -1)[..., :m]

    def delta(self, W: Tensor, p: Params) -> Tensor:
        m, n = W.shape
        return self._change(torch.eye(n, dtype=W.dtype, device=W.device), p["M"], m).T

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        return base(x) + self._change(x, p["M"], len(base.weight))

    def trainable(self, m: int, n: int) -> int:
        return self._side(m, n) ** 2


def _turned(groups: Tensor) -> Tensor:
    """(…, groups, r): in group g the pair (i, i + r/2) is turned by g · 10000^(−2i/r)."""
    count, r = groups.shape[-2:]
    wide = torch.promote_types(groups.dtype, torch.float32)
    frequency = 10000.0 ** -(torch.arange(0, r, 2, dtype=wide, device=groups.device) / r)
    angle = torch.outer(torch.arange(count, dtype=wide, device=groups.device), frequency)
    cos, sin = angle.cos().to(groups.dtype), angle.sin().to(groups.dtype)
    first, second = groups.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
