"""What bottleneck adapters share: two thin matrices with a non-linearity between them, added to what a module returns.

    y' = y + s (U f(D n(x) + b) + c)       D: r × d, U: d × r, f: relu, gelu or silu, n: a LayerNorm or nothing

    x (…, d) ── D ── f ── U ── · s ──┐
    y (…, d) ────────────────────────┴── y'

Published forms differ in where x and y are, in f and in s: each has its file and its names here. U and c start at zero,
so the start is exact; D starts Kaiming-uniform. Kept for backward is x, where D learns, and the r-wide D x + b.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from addenda.core.base.random import Stream
from addenda.core.method.contract import Params
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.returned import like

_aten: Any = torch.ops.aten
# f, and from (∂loss/∂f(a), a) ∂loss/∂a
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu, lambda g, a: _aten.threshold_backward(g, a, 0)),
    "gelu": (F.gelu, lambda g, a: _aten.gelu_backward(g, a)),
    "silu": (F.silu, lambda g, a: _aten.silu_backward(g, a)),
}


@dataclass(frozen=True)
class Bottleneck(HiddenMethod):
    """A method of two thin matrices with a non-linearity between them, added to a module's output.

    rank: the width r of the bottleneck. scale: s. bias: whether b and c are there. norm: whether n is a LayerNorm
    with its own weights. dropout: of what leaves the non-linearity, in training.
    """

    sized_by: ClassVar[str] = "rank"
    helpers: ClassVar[tuple[str, ...]] = ("matrices",)
    rank: int = 64
    activation: Literal["relu", "gelu", "silu"] = "relu"
    scale: float = 1.0
    bias: bool = True
    norm: bool = False
    dropout: float = 0.0

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.scale == 0:
            yield "scale must not be 0: no change would ever act"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    def check(self, width: int) -> str | None:
        if self.rank <= width:
            return None
        return f"a bottleneck of {self.rank} is wider than the activations ({width}); rank={width} is the most"

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        tensors = {"down": rng.kaiming_uniform(self.rank, width), "up": torch.zeros(width, self.rank)}
        if self.bias:
            tensors |= {"down_bias": torch.zeros(self.rank), "up_bias": torch.zeros(width)}
        if self.norm:
            tensors |= {"norm_weight": torch.ones(width), "norm_bias": torch.zeros(width)}
        return {k: nn.Parameter(t) for k, t in tensors.items()}

    def matrices(self, p: Params) -> tuple[Tensor, Tensor]:
        """Return (D: r × d, U: d × r) from the trained tensors."""
        return p["down"], p["up"]

    def change(self, x: Tensor, y: Tensor, p: Params, training: bool = False) -> Tensor:
        if self.reads == "stream":
            x = x + y.to(x.dtype)
        if self.norm:
            normed = F.layer_norm(x, x.shape[-1:], p["norm_weight"].to(x.dtype), p["norm_bias"].to(x.dtype))
        else:
            normed = x
        D, U = self.matrices(p)
        drop = self.dropout if training else 0.0
        base = None if normed is y else y
        rows = _Added.apply(normed, base, D, p.get("down_bias"), U, p.get("up_bias"), self.activation, self.scale, drop)
        return like(y, rows)

    def trainable(self, width: int) -> int:
        return 2 * self.rank * width + self.bias * (self.rank + width) + self.norm * 2 * width


class _Added(torch.autograd.Function):
    """The rows of y + s (U f(D x + b) + c), see `core.modules.returned`. y: None where it is x.

    Matrices may be float32 masters: they are cast, x never is.
    """

    @staticmethod
    def forward(ctx, x, y, D, b, U, c, activation, scale, drop):
        dtype = x.dtype
        down, up = D.to(dtype), U.to(dtype)
        a = F.linear(_rows(x), down, None if b is None else b.to(dtype))
        h, mask = ACTIVATIONS[activation][0](a), None
        if drop:
            mask = torch.empty_like(h, dtype=torch.bool).bernoulli_(1 - drop)
            h = h * mask / (1 - drop)
        ctx.activation, ctx.scale, ctx.drop, ctx.serial, ctx.shape = activation, scale, drop, y is None, x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (D, b, U, c)]
        need_d = ctx.needs_input_grad[2]
        ctx.save_for_backward(x if need_d else None, a, down, up, mask)
        base = _rows(x if y is None else y)
        if base.dtype == dtype:
            out = torch.addmm(base, h, up.t(), alpha=scale)
        else:
            out = base + (h @ up.t()).mul_(scale).to(base.dtype)
        if c is not None:
            out.add_(c.to(out.dtype), alpha=scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, a, down, up, mask = ctx.saved_tensors
        need_x, need_y, need_d, need_b, need_u, need_c, *_ = ctx.needs_input_grad
        g, act, of_act = gy, *ACTIVATIONS[ctx.activation]
        narrow = g.to(a.dtype)
        gd = gb = gu = gc = gx = None
        of_d, of_b, of_u, of_c = ctx.dtypes
        if need_u:
            h = act(a) if mask is None else act(a) * mask / (1 - ctx.drop)
            gu = (h.t() @ narrow).t().mul(ctx.scale).to(of_u, memory_format=torch.contiguous_format)
        if need_c:
            gc = g.sum(0, dtype=of_c).mul_(ctx.scale)
        gh = narrow @ up
        gh = gh.mul_(ctx.scale) if mask is None else gh * mask * (ctx.scale / (1 - ctx.drop))
        ga = of_act(gh, a)
        if need_b:
            gb = ga.sum(0, dtype=of_b)
        if need_d:
            gd = (ga.t() @ _rows(x)).to(of_d)
        if need_x:
            gx = torch.addmm(g, ga, down) if ctx.serial else ga @ down
            gx = gx.view(ctx.shape)
        return gx, gy.view(ctx.shape) if need_y else None, gd, gb, gu, gc, None, None, None


def _rows(t: Tensor) -> Tensor:
    """Return t as rows (tokens, width), whatever its leading dimensions."""
    return t.reshape(-1, t.shape[-1])
