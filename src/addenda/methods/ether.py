"""ETHER+: both sides of W are changed by pairs of hyperplanes (Bini et al. 2024, arXiv 2405.20271).

    W' = G W H,   H = blockdiag(I − u_i u_iᵀ + v_i v_iᵀ)  (n × n),   G likewise  (m × m),   u_i, v_i of unit length

    x ── H ── W ── G ── + bias ── y          v = u at the start, where every pair cancels

‖H_i − I‖ stays within √2 (Frobenius) for every block, whatever the learning rate. H and G are not orthogonal. For an
exact start v vᵀ − u uᵀ is computed as d vᵀ + u dᵀ with d = v − u, which is 0 there.

`plus=False` is ETHER: W' = W H with the reflections H_i = I − 2 u_i u_iᵀ, at the distance 2 from the identity, always.
So it does not start at the base, and says so; half of the vectors, one side.

The number of blocks changes neither the count nor, in this form, the cost. The authors' code (lit_gpt/ether.py) cuts W
by a reshape that gives each block a group of rows, not of columns; here blocks are the paper's. Its v starts at −u: the
same H, and the same training. Cost: 2 (n + m) numbers (ETHER: n); 4 (n + m) multiply-adds a token. Not for
changes that need more than one direction a block.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register, variant
from addenda.core.method.contract import Base, Params, Start, WeightMethod


@register(
    "ether",
    title="ETHER+",
    paper="Bini et al. 2024, arXiv:2405.20271",
    equation="W' = G W H, G and H blockdiag(I − u uᵀ + v vᵀ)",
    hypothesis="A bounded change along one pair of directions in each block of inputs and outputs is enough.",
    family="rotation",
    rate=1e-2,
    paper_setting="Llama-2-7B: 32 blocks (here 4), best there; 1 and 4 are compared for cost alone (paper, table 5; "
    "release's README). The release's script has 1 by default, on query and value, with 1,000 warm-up steps.",
)
@dataclass(frozen=True)
class ETHER(WeightMethod):
    """parts: into how many blocks each side is cut. plus: ETHER+; False: ETHER, one reflection a block of inputs."""

    parts: int = 4
    plus: bool = True

    def validate(self):
        if self.parts < 1:
            yield f"parts must be at least 1, got {self.parts}"

    @property
    def starts(self) -> Start:
        return Start() if self.plus else Start(2.0, "a reflection is never the identity: ‖W H − W‖ ≤ 2 ‖W‖")

    def check(self, m: int, n: int) -> str | None:
        for side, width in (("input", n), ("output", m))[: 1 + self.plus]:
            if width % self.parts:
                return f"parts={self.parts} does not divide the {side} width {width}"
            if width == self.parts:
                return f"parts={self.parts} leaves blocks of one {side} each, where no direction can be chosen"
        return None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        u = rng.kaiming_uniform(self.parts, n // self.parts)
        if not self.plus:
            return {"u": nn.Parameter(u)}
        s = rng.kaiming_uniform(self.parts, m // self.parts)
        return {k: nn.Parameter(t.clone()) for k, t in {"u": u, "v": u, "out_u": s, "out_v": s}.items()}

    def _change(self, x: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
        """x (…, width) times H − I."""
        u = F.normalize(u.to(torch.promote_types(u.dtype, torch.float32)), dim=1)
        if v is None:
            into, back = u[:, :, None], -2 * u[:, None]
        else:
            v = F.normalize(v.to(u.dtype), dim=1)
            d = v - u
            into, back = torch.stack([d, u], 2), torch.stack([v, d], 1)
        blocks = x.reshape(-1, *u.shape).transpose(0, 1)
        changed = (blocks @ into.to(x.dtype)) @ back.to(x.dtype)
        return changed.transpose(0, 1).reshape(x.shape)

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        y = base(x + self._change(x, p["u"], p.get("v")))
        if not self.plus:
            return y
        return y + self._change(y if base.bias is None else y - base.bias, p["out_u"], p["out_v"])

    def effective(self, W: Tensor, p: Params) -> Tensor:
        W = W + self._change(W, p["u"], p.get("v"))
        return W + self._change(W.T, p["out_u"], p["out_v"]).T if self.plus else W

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return self.effective(W, p) - W

    def trainable(self, m: int, n: int) -> int:
        return 2 * (n + m) if self.plus else n


variant(
    "ether-plain",
    ETHER,
    {"plus": False},
    title="ETHER",
    equation="W' = W H, H = blockdiag(I − 2 u uᵀ)",
    hypothesis="One reflection in each block of inputs is enough, and its distance from the identity may be fixed.",
    paper_setting="Llama-2-7B: 32 blocks (here 4), best there; 1 and 4 are compared for cost alone (paper, table 5; "
    "release's README). The release's script has 1 by default, on query and value, with 1,000 warm-up steps.",
)
