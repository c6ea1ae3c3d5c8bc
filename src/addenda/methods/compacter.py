"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products (Mahabadi et al. 2021, 2106.04647).

    D = Σ_i A_i ⊗ (s_i t_iᵀ)      A_i: n × n, s_i: r/n, t_i: d/n, i = 1 … n;   U likewise, with the same A_i

after attention and after the MLP, as Houlsby's (targets="mlp" alone is Compacter++). The A_i are one set for all
places, trained by all. In U the t_i start at zero, so the start is exact; the other vectors start Kaiming-uniform, the
A_i at N(0, 1/n), where the released code has N(0, 0.01²).

rank is the width of the bottleneck. The published 32 is a reduction factor: reduction=32 makes every bottleneck as wide
as its place divided by it, in place of rank, 24 at 768.

Cost: n³ numbers once and 2 (r + d) + r + d a place (n = 4, r = 32 and d = 768: 64 and 2,400, instead of 49,952).
D and U are formed, n r d multiply-adds each a forward, and run as those of any bottleneck: it saves numbers, no time.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.bottleneck import Bottleneck
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params, Shape


@register(
    "compacter",
    title="Compacter",
    paper="Mahabadi et al. 2021, arXiv:2106.04647",
    equation="o' = o + U f(D o + b) + c, D = Σ_i A_i ⊗ s_i t_iᵀ, U likewise, A_i of all places",
    hypothesis="An adapter's matrices repeat a few small patterns: they are short sums of Kronecker products.",
    family="hidden",
    rate=3e-3,
    paper_setting="T5: n = 4 and a reduction factor of 32 (reduction=32, 24 wide at 768; here rank=32), gelu, norms "
    "trained beside, rate 3e-3 (release's configuration).",
)
@dataclass(frozen=True)
class Compacter(Bottleneck):
    """parts: n. rank: r, a multiple of n. reduction: r is width / reduction instead. See `core.method.bottleneck`."""

    targets: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    rank: int = 32
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    parts: int = 4
    reduction: int | None = None

    def validate(self):
        yield from super().validate()
        if self.reduction is not None and self.reduction < 1:
            yield f"reduction must be at least 1, or None for the rank as it is given, got {self.reduction}"
        if self.reduction is not None and self.rank != type(self).rank:
            yield f"rank and reduction both say how wide a bottleneck is; got {self.rank} and {self.reduction}"
        if self.parts < 1:
            yield f"parts must be at least 1, got {self.parts}"
        elif self.reduction is None and self.rank % self.parts:
            yield f"rank must be a multiple of parts ({self.parts}), got {self.rank}"

    def _at(self, width: int) -> "Compacter":
        """The same with the rank that reduction makes of this width."""
        return self if self.reduction is None else replace(self, rank=width // self.reduction, reduction=None)

    def check(self, width: int) -> str | None:
        if width % self.parts:
            return f"a width of {width} cannot be cut into {self.parts} equal parts"
        if self.reduction is not None:
            rank = width // self.reduction
            if not rank or rank % self.parts:
                return f"width {width} / reduction {self.reduction} is {rank}, no multiple of parts ({self.parts})"
            return None
        return super().check(width)

    def pool(self, shapes: list[Shape], rng: Stream) -> Params:
        return {"rule": nn.Parameter(rng.normal(self.parts, self.parts, self.parts, std=self.parts**-0.5))}

    def pooled(self, shapes: list[Shape]) -> int:
        return self.parts**3

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        if self.reduction is not None:
            return self._at(width).init(width, rng, p)
        n, own = self.parts, super().init(width, rng, p)
        del own["down"], own["up"]
        for name, rows, columns in (("down", self.rank, width), ("up", width, self.rank)):
            own[f"{name}_rows"] = nn.Parameter(rng.kaiming_uniform(n, rows // n))
            start = torch.zeros(n, columns // n) if name == "up" else rng.kaiming_uniform(n, columns // n)
            own[f"{name}_columns"] = nn.Parameter(start)
        return own

    def matrices(self, p: Params) -> tuple[Tensor, Tensor]:
        D, U = (
            torch.einsum("iab,ir,ic->arbc", p["rule"], p[f"{k}_rows"], p[f"{k}_columns"]).flatten(2).flatten(0, 1)
            for k in ("down", "up")
        )
        return D, U

    def trainable(self, width: int) -> int:
        outer = self._at(width).rank + width
        return 2 * outer + self.bias * outer + self.norm * 2 * width
