"""LoRA-GA: a LoRA whose first step is nearest to full fine-tuning's (Wang et al. 2024, arXiv 2407.05000).

    G = Σ ∂loss/∂W over the calibration batches = U Σ Vᵀ
    A0 = c Vᵀ[:r],   B0 = c U[:, r:2r],   c = m^¼ / √γ          ΔW = s ((B0 + dB)(A0 + dA) − B0 A0)

The first gradient step moves W by −η s² (B0 B0ᵀ G + G A0ᵀ A0) = −η s² c² times the best approximation of G that has
rank 2r: A0 sees the r largest singular directions, B0 the r after them. Only the directions of G matter, not its size:
neither the loss's scale nor the number of batches changes the start. (PEFT 0.21.2 multiplies B0 by singular values of
G, so there the scale of the loss decides how far B0 starts from zero.)

The paper subtracts s B0 A0 from W. Here the offsets dA and dB are trained, as with PiSSA: the base stays as it is, and
the start is exactly zero. A0 and B0 come from data, so they are saved with the adapter: r (m + n) frozen numbers more.
The paper scales by α/√r; with s = α/r as here, give alpha √r times as large.

Where G has fewer than 2r singular values above zero (few tokens, most rows of an embedding), the directions behind them
are any that complete a basis. The statement above holds for them too, and they learn like LoRA's.

Cost: r (m + n) numbers a site, two rank-2r products a pass. The calibration pass keeps a float32 G for every site, as
large as the weights, until all batches are seen. Not for weights that hardly fit as they are.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.core.method.lowrank import LowRank


@register(
    "lora-ga",
    title="LoRA-GA",
    paper="Wang et al. 2024, arXiv:2407.05000",
    equation="ΔW = s ((B0+dB)(A0+dA) − B0 A0), A0 and B0 singular directions of ∂loss/∂W",
    hypothesis="The low-rank change that a task needs lies near the directions of its first gradient.",
    family="low-rank",
    rate=1e-3,
    published="T5-base, 5 tasks of GLUE: full fine-tuning 87.91, LoRA 82.08, LoRA-GA 87.77 (as a later paper, LoRA- "
    "MGPO, prints it).",
    paper_setting="r = 8 and α = 16 on all linear layers with rsLoRA's scale and γ = 64 in the release's "
    "reproduction, γ = 16 by default (here r = 8, s = 1 and γ = 16); its example for LLaMA-2 has r = 32, α = 8 and "
    "rate 2e-5.",
)
@dataclass(frozen=True)
class LoRAGA(LowRank):
    """gamma: the factors start as long as m^¼/√gamma."""

    gamma: float = 16.0

    def validate(self):
        yield from super().validate()
        if self.gamma <= 0:
            yield f"gamma must be above 0, got {self.gamma}"

    def check(self, m: int, n: int) -> str | None:
        few = 2 * self.rank > min(m, n)
        return f"rank {self.rank} takes {2 * self.rank} singular directions, {m} × {n} has {min(m, n)}" if few else None

    @property
    def calibration(self) -> Literal["gradient"]:
        return "gradient"

    def calibrate(self, W: Tensor, G: Tensor, seen: Tensor | None) -> Tensor:
        return G.clone() if seen is None else seen + G

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, r = len(W), self.rank
        U, _, Vt = singular_triplets(p["calibration"], 2 * r)
        c = m**0.25 / self.gamma**0.5
        return super().init(W, rng, p) | {"A0": (c * Vt[:r]).to(W.dtype), "B0": (c * U[:, r:]).to(W.dtype)}
