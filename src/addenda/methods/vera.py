"""VeRA: random matrices shared by all sites, two trained vectors a site (Kopiczko et al. 2023, arXiv 2310.11454).

    ΔW = diag(b) B diag(d) A      A (r × n), B (m × r) frozen;  b (m) from 0, d (r) from 0.1

    x (…, n) ── A ── ∘ d ── B ── ∘ b ──┐
         └──────── W (m × n) ──────────┴── y

A and B are Kaiming-uniform, ±√(6/fan-in) as in PEFT, drawn once for the widest input and the tallest output
among the sites; smaller sites take the first columns and rows. They come from the seed and are never saved.

Cost: m + r numbers a site; r (m + n) multiply-adds a token, at ranks of 256 to 1024 more than a LoRA's; one
pair of projections in memory for all sites. Not for speed, and not where a head needs the same learning rate:
VeRA wants a larger.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod


@register(
    "vera",
    title="VeRA",
    paper="Kopiczko et al. 2023, arXiv:2310.11454",
    equation="ΔW = diag(b) B diag(d) A, A and B random and shared",
    hypothesis="Random directions will do, the same ones everywhere; a site only needs to weigh them.",
    family="low-rank",
    rate=3e-2,
    published="RoBERTa-base, GLUE: VeRA 85.2 with 0.043 M numbers, LoRA 86.6, full fine-tuning 85.2; its copy of "
    "LoRA's row starts RTE from MNLI, others' do not. PEFT's own benchmark, Llama-3.2-3B, GSM8K: VeRA "
    "0.354, LoRA r = 32 0.478.",
    paper_setting="r = 1024 on RoBERTa-base, 256 on RoBERTa-large (here 256), on query and value, the head at a "
    "rate of its own.",
)
@dataclass(frozen=True)
class VeRA(WeightMethod):
    """d_initial: the start of d."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 256
    d_initial: float = 0.1

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.d_initial == 0:
            yield "d_initial must not be 0: with b = 0 no gradient would ever reach the adapter"

    def shared(self, shapes: list[Shape], rng: Stream) -> Params:
        m, n = (max(sizes) for sizes in zip(*shapes, strict=True))
        a, b = (6 / n) ** 0.5, (6 / self.rank) ** 0.5
        return {
            "A": rng.uniform(self.rank, n, low=-a, high=a),
            "B": rng.uniform(m, self.rank, low=-b, high=b),
        }

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        d = torch.full((self.rank,), float(self.d_initial))
        return {"b": nn.Parameter(torch.zeros(len(W))), "d": nn.Parameter(d)}

    def factors(self, p: Params, shape: Shape) -> Factors:
        m, n = shape
        return Factors(p["B"][:m], p["A"][:, :n], middle=p["d"], rows=p["b"])

    def trainable(self, m: int, n: int) -> int:
        return m + self.rank
