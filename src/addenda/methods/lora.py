"""LoRA: ΔW = s B A, a low-rank change (Hu et al. 2021, arXiv 2106.09685; s = α/√r: Kalajdzievski 2023, 2312.03732).

    x ── A (r × n) ── B (m × r) ── · s ──┐
    └───────────── W (m × n) ────────────┴── y

A starts Kaiming-uniform, B at zero, so the change starts at zero. Other origins start both factors inside W:

    origin="pissa"   s B0 A0 = the r largest singular triplets of W                       Meng et al. 2024, 2404.02948
    origin="olora"   B0 = the first r columns of Q, A0 = the first r rows of R, W = Q R   Büyükakyüz 2024, 2406.01775

The papers subtract s B0 A0 from W; here the offsets dA and dB are trained instead,
ΔW = s (B dA + dB A0) = s [B0 + dB | dB] [dA ; A0]: the same model, the same gradients, but the base stays as it is and
the start is exactly zero in every dtype.

PiSSA divides s out of its factors, OLoRA does not (nor does PEFT), so that B0 stays orthonormal: with s ≠ 1 it moves s
times that part of W. Signs are fixed so that R has no negative diagonal entry, which makes Q and R unique. Trap: "the
first r" are the first r columns of W, in no order of size. Both origins are found from W at load, in float64.

rsLoRA has one α for all ranks, as its claim is about how s falls with r; alpha=None would make it √r. The 8 is this
library's choice, not known to be the paper's; PEFT's default is 8 too, so that s = √8 at the default rank in both.

On embeddings B holds the rows, from zero, and A the matrix behind them, Kaiming-uniform as everywhere; loralib draws
that A from N(0, 1), √(3 · width) times as large (14 times at a width of 64): draw="normal", for every site it is given.

Cost: r (m + n) numbers a site; two rank-r products a pass (rank 2r with PiSSA and OLoRA). Not for changes of high rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register, variant
from addenda.core.method.contract import Params
from addenda.core.method.lowrank import LowRank


@register(
    "lora",
    title="LoRA",
    paper="Hu et al. 2021, arXiv:2106.09685",
    equation="ΔW = (α/r) B A",
    hypothesis="The change that a task needs has low rank, in directions that need not be those of W.",
    family="low-rank",
    rate=3e-3,
    published="RoBERTa-large, GLUE: full fine-tuning 88.9, LoRA 89.0 with 0.8 M numbers (paper). PEFT's own "
    "benchmark, Llama-3.2-3B, GSM8K: LoRA r = 32 0.478, r = 64 with rsLoRA's scale 0.513, full fine- "
    "tuning 0.472. The LoRA baseline on Llama-2-7B and GSM8K is 40.75, 42.08, 42.85 or 50.2, depending on "
    "the paper: rows of different papers do not compare.",
    paper_setting="query and value only (here every linear layer): r = 8 with α = 8 or 16 on RoBERTa, r = 4 with α = "
    "32 on GPT-2 (paper, appendix D).",
)
@dataclass(frozen=True)
class LoRA(LowRank):
    """alpha: None means alpha = rank (scale 1). scaling: "classic" α/r, "rs" α/√r. origin, draw: see the module."""

    scaling: Literal["classic", "rs"] = "classic"
    origin: Literal["zero", "pissa", "olora"] = "zero"
    draw: Literal["uniform", "normal"] = "uniform"

    def validate(self):
        yield from super().validate()
        if self.draw == "normal" and self.origin != "zero":
            yield f"draw='normal' is how A starts beside a B of zero, and origin={self.origin!r} draws nothing"

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "classic" else self.rank**0.5)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        if self.origin == "zero":
            return {}
        if self.origin == "pissa":
            U, S, Vt = singular_triplets(W, self.rank)
            root = (S / self.scale).sqrt()
            A0, B0 = root[:, None] * Vt, U * root
        else:
            exact = W.cpu().double()
            Q, R = torch.linalg.qr(exact[:, : self.rank])  # r columns give r columns: the rest of Q is not needed
            B0 = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
            A0 = B0.T @ exact
        return {"A0": A0.to(W.dtype), "B0": B0.to(W.dtype)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        own, shape = super().init(W, rng, p), (self.rank, W.shape[1])
        if self.origin != "zero":
            return own
        return own | {"A": nn.Parameter(rng.normal(*shape) if self.draw == "normal" else rng.kaiming_uniform(*shape))}


variant(
    "rslora",
    LoRA,
    {"scaling": "rs", "alpha": 8.0},  # one α for all ranks, or s = √r would grow with r
    title="rsLoRA",
    paper="Kalajdzievski 2023, arXiv:2312.03732",
    equation="ΔW = (α/√r) B A",
    hypothesis="The change is low-rank, and the right scale of a rank-r product falls as 1/√r, not as 1/r.",
    paper_setting="one α for all ranks, as s = α/√r says; its value was not checked. The preset's α = 8 is this "
    "library's choice (2.8 times LoRA's scale at r = 8); PEFT's defaults, r = 8 and lora_alpha = 8, give the same √8.",
)
variant(
    "pissa",
    LoRA,
    {"origin": "pissa"},
    title="PiSSA",
    paper="Meng et al. 2024, arXiv:2404.02948",
    equation="ΔW = s ((B0+dB)(A0+dA) − B0 A0), s B0 A0 the r largest singular triplets of W",
    hypothesis="The change lies near the principal singular directions of W.",
    rate=1e-3,
    paper_setting="r = 128 and α = r (here r = 8) on all linear layers, rate 2e-5, batch 128.",
)
variant(
    "olora",
    LoRA,
    {"origin": "olora"},
    title="OLoRA",
    paper="Büyükakyüz 2024, arXiv:2406.01775",
    equation="ΔW = s ((B0+dB)(A0+dA) − B0 A0), B0 A0 = Q_r R_r of W = Q R",
    hypothesis="The change is best found from orthonormal directions of the output, a basis of W's own columns.",
    rate=1e-3,
    paper_setting="r = 32, α = 16 (s = ½; here r = 8, s = 1), dropout 0.05, rate 3e-4, as the example that its "
    "author added to PEFT has them; the paper's own tables were not checked.",
)
