"""FourierFT: ΔW is the inverse Fourier transform of a few trained coefficients (Gao et al. 2024, arXiv 2405.03003).

    ΔW[j, k] = α/(m n) Σ_l c_l cos(2π (u_l j/m + v_l k/n))   =   α Re IFFT2(zero but for c_l at (u_l, v_l))

The positions (u_l, v_l) are distinct and drawn from the seed, never saved. The coefficients start at zero, so the start
is exact; the paper and PEFT start them from N(0, 1), which changes the model before the first step. The paper's formula
has no 1/(m n), its code has, and its values of α (100 to 300) belong to the code.

Every wave is two outer products. Up to 64 frequencies they act as thin factors, cos and sin on either side; with more,
ΔW is formed by one transform a pass. Traps: the same α makes larger changes in smaller layers; the mirror image of a
position, (−u, −v), is the same wave, so many frequencies in a small layer repeat each other. The paper shares the
positions between all layers, here every site has its own.

Cost: one number a frequency; one transform of m × n and a dense gradient a pass. Every wave touches all entries: not
for changes that sit in a few rows.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod

_FEW = 64  # frequencies whose factors, of rank 128, are cheaper than a dense change


@register(
    "fourierft",
    title="FourierFT",
    paper="Gao et al. 2024, arXiv:2405.03003",
    equation="ΔW = α Re IFFT2(c at random positions)",
    hypothesis="A change that is spread over the whole weight can be written with a few waves.",
    family="spectral",
    rate=3e-2,
    published="Mean of 6 tasks of GLUE: RoBERTa-base full fine-tuning 85.2, LoRA 85.2 with 0.3 M numbers, FourierFT "
    "85.0 with 0.024 M; RoBERTa-large 88.2, 87.8 with 0.8 M, 88.0 with 0.048 M (paper; baselines copied).",
    paper_setting="1000 frequencies, as here, on query and value only; α from 29 to 151 by task on RoBERTa (here "
    "150), rates of 0.04 to 0.12 (release's GLUE scripts).",
)
@dataclass(frozen=True)
class FourierFT(WeightMethod):
    """frequencies: how many coefficients a site trains. alpha: the scale."""

    sized_by: ClassVar[str] = "frequencies"
    frequencies: int = 1000
    alpha: float = 150.0

    def validate(self):
        if self.frequencies < 1:
            yield f"frequencies must be at least 1, got {self.frequencies}"
        if self.alpha == 0:
            yield "alpha must not be 0: nothing would ever change"

    def check(self, m: int, n: int) -> str | None:
        return f"frequencies={self.frequencies} is above {m} · {n}" if self.frequencies > m * n else None

    def has(self, hook: str) -> bool:
        return super().has(hook) and (hook != "factors" or self.frequencies <= _FEW)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        m, n = W.shape
        index = rng.choice(m * n, self.frequencies)
        if not self.has("factors"):
            return {"index": index.int()}
        down = torch.outer(torch.arange(m), index // n) % m  # whole turns left out
        across = torch.outer(index % n, torch.arange(n)) % n
        down, across = down.double() * (2 * math.pi / m), across.double() * (2 * math.pi / n)
        B = torch.cat([down.cos(), -down.sin()], 1)  # cos(s + t) = cos s cos t − sin s sin t
        A = torch.cat([across.cos(), across.sin()])
        return {"B": B.to(W.dtype), "A": A.to(W.dtype)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"c": nn.Parameter(torch.zeros(self.frequencies))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        c = p["c"] * (self.alpha / (shape[0] * shape[1]))
        return Factors(p["B"], p["A"], torch.cat([c, c]))

    def delta(self, W: Tensor, p: Params) -> Tensor:
        if self.has("factors"):
            return super().delta(W, p)
        c = p["c"]
        spectrum = c.new_zeros(W.numel()).index_put((p["index"],), c).view(W.shape)
        return self.alpha * torch.fft.ifft2(spectrum).real

    def trainable(self, m: int, n: int) -> int:
        return self.frequencies
