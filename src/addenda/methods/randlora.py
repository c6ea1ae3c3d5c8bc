"""RandLoRA: a full-rank sum of random low-rank products, scaled by trained diagonals (Albert et al. 2025, 2502.00987).

    ΔW = s Σ_j B_j diag(λ_j) A diag(γ_j),   j = 1 … ⌈k/r⌉,   k = min(m, n)        (its transpose where m < n)

A (r × k) and the B_j (max(m, n) × r) are random, from the seed and never saved, drawn once for the largest site: its
first rows and columns serve the others. Entries are uniform with variance 1. λ (r) starts at 0 and γ (k) at 1/k: the
start is exact. s = α/r, with α = 20 r as released. A smaller r trains more numbers, and every r can reach full rank.

PEFT divides by the measured deviation of its random numbers, here it is the exact one. It also pairs the columns of B
and the rows of A in another order, which for random numbers is another draw. Its sparse bases are left out.

Cost: ⌈k/r⌉ (r + k) numbers a site; one random matrix as large as the largest weight. ΔW is formed once a pass, in
max(m, n) k² multiply-adds whatever the number of tokens: little beside long batches, much for one token, so merge
before generating text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params, Shape
from addenda.core.method.lowrank import Ranked


@register(
    "randlora",
    title="RandLoRA",
    paper="Albert et al. 2025, arXiv:2502.00987",
    equation="ΔW = s Σ_j B_j diag(λ_j) A diag(γ_j), A and B_j random and shared",
    hypothesis="The change has full rank, and random directions will do if enough of them are weighed.",
    family="dense",
    rate=1e-3,
    paper_setting="r chosen for about as many numbers as a LoRA of rank 32: 6, 8 and 10 on CLIP's three sizes "
    "(paper, §5.2 and §5.3; here 32); the release's script for RoBERTa has 64. q, k, v, up and down of LLaMA, at 1e-4.",
)
@dataclass(frozen=True)
class RandLoRA(Ranked):
    """rank: the rank r of one random product; smaller trains more. alpha: None means 20 · rank (s = 20)."""

    rank: int = 32

    @property
    def scale(self) -> float:
        return 20.0 if self.alpha is None else self.alpha / self.rank

    def _terms(self, narrow: int) -> int:
        return -(-narrow // self.rank)

    def shared(self, shapes: list[Shape], rng: Stream) -> Params:
        wide, narrow = max(max(s) for s in shapes), max(min(s) for s in shapes)
        bound = 3**0.5
        return {
            "A": rng.uniform(self.rank, narrow, low=-bound, high=bound),
            "B": rng.uniform(wide, self._terms(narrow) * self.rank, low=-bound, high=bound),  # [B_1 B_2 …]
        }

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        narrow = min(W.shape)
        return {
            "lam": nn.Parameter(torch.zeros(self._terms(narrow), self.rank)),
            "gamma": nn.Parameter(torch.full((self._terms(narrow), narrow), 1 / narrow)),
        }

    def delta(self, W: Tensor, p: Params) -> Tensor:
        wide, narrow = max(W.shape), min(W.shape)
        A = (p["lam"][:, :, None] * p["A"][:, :narrow] * p["gamma"][:, None]).flatten(0, 1)
        change = p["B"][:wide, : len(A)] @ (self.scale * A)
        return change if len(W) == wide else change.T

    def trainable(self, m: int, n: int) -> int:
        return self._terms(min(m, n)) * (self.rank + min(m, n))
