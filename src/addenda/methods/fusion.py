"""AdapterFusion: attention over what several adapters would change (Pfeiffer et al. 2021, arXiv 2005.00247).

    q = Q x,   k_i = K Δ_i,   v_i = V Δ_i,   p = softmax_i(q · k_i / T)        Q, K, V: d × d
    y' = y + Σ_i p_i v_i

    with ad.composed(model, ad.Fuse("a", "b", "c", by="fusion")): ...

Δ_i is what adapter i would add to y, x what the fusion itself reads, so it is attached where its adapters are, and
reads what they read: the default is Pfeiffer's place. The scores are not divided by √d. V is trained as an offset from
the identity, so that at first the adapters' changes are averaged with weights that hardly depend on x; Q and K start at
N(0, 0.02). The `adapters` library lowers T from 50 a little in every forward; here T is an option and stays.

Alone it changes nothing: its adapters are trained before, and only it is trained then
(`ad.adapters(model)["a"].requires_grad_(False)`).

Cost: 3 d² numbers a place, far more than its adapters have, and three products of that size a token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.core.method.hidden import HiddenMethod


@register(
    "fusion",
    title="AdapterFusion",
    paper="Pfeiffer et al. 2021, arXiv:2005.00247",
    equation="y' = y + Σ_i softmax_i(Q x · K Δ_i / T) V Δ_i, over the changes Δ_i of other adapters",
    hypothesis="What several tasks have learnt can be chosen from, token by token, without changing it.",
    family="composition",
    rate=1e-4,
    paper_setting="the value matrix starts as the identity (to 1e-6) and a penalty of weight 0.01 holds it there "
    "(here exactly, and no penalty); T falls from 50 where that is switched on (its authors' library; the paper's own "
    "values were not checked).",
)
@dataclass(frozen=True)
class Fusion(HiddenMethod):
    """temperature: T. reads: where its adapters are, see `core.method.hidden`."""

    temperature: float = 1.0
    reads: Literal["sum", "output", "input", "residual"] = "sum"

    def validate(self):
        if self.temperature <= 0:
            yield f"temperature must be above 0, got {self.temperature}"

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        own: Params = {k: nn.Parameter(rng.normal(width, width, std=0.02)) for k in ("query", "key")}
        return own | {"value": nn.Parameter(torch.zeros(width, width))}

    def change(self, x: Tensor, y: Tensor, p: Params, training: bool = False) -> Tensor:
        return y

    def fuse(self, x: Tensor, y: Tensor, changes: list[Tensor], p: Params) -> Tensor:
        Q, K, V = (p[k].to(x.dtype) for k in ("query", "key", "value"))
        changes = [z.to(x.dtype) for z in changes]
        q = x @ Q.t() @ K  # of every token, once: q · K Δ_i = Kᵀ q · Δ_i
        scores = torch.stack([(q * z).sum(-1) for z in changes], -1) / self.temperature
        shares = scores.float().softmax(-1) if x.dtype != torch.float64 else scores.softmax(-1)
        mean = sum((s[..., None] * z for s, z in zip(shares.to(x.dtype).unbind(-1), changes, strict=True)), 0 * x)
        return y + (mean + mean @ V.t()).to(y.dtype)  # Σ p_i V Δ_i is one product

    def trainable(self, width: int) -> int:
        return 3 * width * width
