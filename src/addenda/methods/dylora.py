"""DyLoRA: a LoRA whose first b ranks are a good adapter for every b (Valipour et al. 2022, arXiv 2210.07558).

    each step draws b uniformly from min_rank … rank, the same b at every site:   ΔW = (α/b) B[:, :b] A[:b]

    A (r × n)  Kaiming-uniform     B (m × r)  zeros     active  b: the drawn one in training, the stored one otherwise

With `frozen`, only the b-th row of A and column of B get a gradient; those before it act as constants. The
draw is a tensor (ranks beyond b are multiplied by 0), so nothing recompiles. `set_rank(adapter, b)` chooses
the rank that acts outside training and is saved. The scale is α/b at every b, as in the released code:
cutting to b gives a plain LoRA with the same alpha, which `export(adapter, b)` attaches beside it. `search_rank`
finds the smallest b that a score of yours calls good enough, without training.

With `unit` (LyCORIS's block size) b is drawn in multiples of it, and `frozen` trains the last unit of ranks. LyCORIS
scales by α over the number of units, this by α over the number of ranks.

Traps: plain Adam would go on moving rows that got no gradient, by momentum and weight decay, so `frozen` is
trained by "rowwise-adamw", which leaves them alone bit for bit; with plain AdamW only their gradient is
frozen. The paper's "4 to 7 times faster" is one run against one run for every rank; a step costs
what LoRA's costs.

Cost: r (m + n) numbers a site, two rank-r products a pass. Not needed where the rank is known beforehand.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.adapted import SiteTensors
from addenda.core.adapter import Adapter
from addenda.core.attach import attach, switch
from addenda.core.borrow import training_mode
from addenda.core.errors import AddendaError
from addenda.core.method import Factors, Pair, Params, Shape, WeightMethod, too_high
from addenda.core.random import Stream
from addenda.core.registry import info, register
from addenda.core.state import record_of
from addenda.core.targets import Target


@register(
    "dylora",
    title="DyLoRA",
    paper="Valipour et al. 2022, arXiv:2210.07558",
    equation="ΔW = (α/b) B[:, :b] A[:b], b drawn every step",
    hypothesis="The change has low rank, and its directions can be ordered so that any first few do best.",
    family="low-rank",
    rate=3e-3,
    published="As later papers print it, RoBERTa-base, mean of 6 tasks: full fine-tuning 85.2, LoRA 85.2, DyLoRA "
    "84.5 (FourierFT's); GPT-2 medium, E2E BLEU: LoRA 68.9, DyLoRA 69.2 (VeRA's).",
)
@dataclass(frozen=True)
class DyLoRA(WeightMethod):
    """rank: the largest. alpha: None means alpha = rank, a scale of 1 at the full rank. frozen: see the module."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 8
    min_rank: int = 1
    alpha: float | None = None
    dropout: float = 0.0
    frozen: bool = False
    unit: int = 1

    def validate(self):
        if not 1 <= self.min_rank <= self.rank:
            yield f"1 <= min_rank <= rank must hold, got min_rank={self.min_rank}, rank={self.rank}"
        if self.unit < 1 or self.rank % self.unit:
            yield f"unit must divide rank, got unit={self.unit}, rank={self.rank}"
        if self.alpha is not None and self.alpha <= 0:
            yield f"alpha must be above 0, got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be in [0, 1), got {self.dropout}"

    @property
    def ranks(self) -> range:
        """The ranks that are drawn: multiples of unit from min_rank on."""
        return range(-(-self.min_rank // self.unit) * self.unit, self.rank + 1, self.unit)

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {
            "A": nn.Parameter(rng.kaiming_uniform(self.rank, n)),
            "B": nn.Parameter(torch.zeros(m, self.rank)),
            "active": torch.tensor(self.rank),
        }

    def on_step(self, step: int, rng: Stream) -> Params:
        return {"active": torch.tensor(self.ranks[rng.integer(0, len(self.ranks) - 1)])}

    def factors(self, p: Params, shape: Shape) -> Factors:
        A, B, b = p["A"], p["B"], p["active"]
        rank = torch.arange(1, self.rank + 1, device=A.device)
        if self.frozen:
            last = (rank <= b) & (rank > b - self.unit)
            A, B = torch.where(last[:, None], A, A.detach()), torch.where(last, B, B.detach())
        alpha = self.rank if self.alpha is None else self.alpha
        return Factors(B, A, (rank <= b).to(B.dtype) * alpha / b.to(B.dtype))

    @property
    def trained_by(self) -> str:
        return "rowwise-adamw" if self.frozen else "adamw"

    def pair(self, p: Params) -> Pair:
        b = p["active"].flatten()[0]  # the same for every matrix of a stack
        live = (torch.arange(self.rank, device=b.device) < b).to(p["A"].dtype)
        alpha = self.rank if self.alpha is None else self.alpha
        return Pair(p["B"] * live, p["A"] * live[:, None], alpha / int(b))

    def trainable(self, m: int, n: int) -> int:
        return self.rank * (m + n)


def set_rank(adapter: Adapter, rank: int) -> None:
    """Choose the rank that acts when the model is not training, at every DyLoRA site; it is saved with the adapter.

    Raises AddendaError when the adapter has no DyLoRA site or the rank is not within one's range.
    """
    for _, t, _ in _sites(adapter, rank):
        t.stored()["active"].fill_(rank)


@torch.no_grad()
def search_rank(
    adapter: Adapter, judge: Callable[[nn.Module], float], tolerance: float = 0.0
) -> tuple[dict[int, float], int]:
    """What `judge(model)` says of every rank that was trained for, and the smallest within `tolerance` of the best.

    judge: a score of the model in evaluation mode, higher is better. Nothing is trained, and the rank is left as it
    was. Raises AddendaError when the adapter is not acting, or has no DyLoRA site, or a score is not a number.
    """
    sites, (_, state, _) = _sites(adapter), record_of(adapter.model, adapter.name)
    if adapter.name not in state.active or state.merged is not None:
        raise AddendaError(
            f"{adapter.name!r} is idle or merged, so every rank would score the same. Call switch or unmerge first."
        )
    ranks = sorted(set.intersection(*(set(m.ranks) for _, _, m in sites)))
    before = [t.stored()["active"].clone() for _, t, _ in sites]
    scores = {}
    try:
        with training_mode(adapter.model, False):
            for b in ranks:
                set_rank(adapter, b)
                scores[b] = float(judge(adapter.model))
    finally:
        for (_, t, _), b in zip(sites, before, strict=True):
            t.stored()["active"].copy_(b)
    if not scores or any(s != s for s in scores.values()):
        raise AddendaError(f"A search wants a number for each rank that all sites were trained for, got {scores}.")
    best = max(scores.values())
    return scores, min(b for b, s in scores.items() if s >= best - tolerance)


def export(adapter: Adapter, rank: int, name: str = "lora") -> Adapter:
    """A plain LoRA of the first `rank` ranks, attached beside the adapter as `name`: idle, to be saved or switched to.

    It computes what the adapter computes at that rank, up to rounding (the sums have fewer terms); heads trained with
    it come along. Raises AddendaError as `attach` does, when the rank is out of range, and when other methods have
    sites in the adapter.
    """
    sites, (root, state, record) = _sites(adapter, rank), record_of(adapter.model, adapter.name)
    if other := set(record.methods) - {path for path, _, _ in sites} - set(record.also_train):
        where = f"{len(other)} sites, e.g. {min(other)}"
        raise AddendaError(f"{adapter.name!r} is no DyLoRA at {where}; nothing was exported.")
    plain: dict[Target, WeightMethod] = {
        _exactly(path): info("lora").build(rank=rank, alpha=float(m.alpha or m.rank), dropout=m.dropout)
        for path, _, m in sites
    }
    acting, tensors = state.active, adapter.state_dict()
    heads = [_exactly(path) for path in record.also_train]
    made = attach(root, plain, also_train=heads, name=name, seed=record.seed, freeze=False)
    for path, _, _ in sites:
        A, B = tensors[f"{path}/A"], tensors[f"{path}/B"]  # of a stack: one for every matrix
        tensors |= {f"{path}/A": A[..., :rank, :], f"{path}/B": B[..., :rank]}
        del tensors[f"{path}/active"]
    made.load_state_dict(tensors)
    switch(root, acting)
    return made.requires_grad_(False)


def _exactly(path: str) -> str:
    return f"re:{re.escape(path)}"


def _sites(adapter: Adapter, rank: int | None = None) -> list[tuple[str, SiteTensors, DyLoRA]]:
    """The DyLoRA sites, all of which can take this rank."""
    sites = [(path, t, t.method) for path, t in adapter.sites() if isinstance(t.method, DyLoRA)]
    if not sites:
        raise AddendaError(f"{adapter.name!r} has no DyLoRA site whose rank could be set.")
    least = min(m.rank for _, _, m in sites)
    if rank is not None and not 1 <= rank <= least:
        raise AddendaError(f"rank must be from 1 to {least}, got {rank}.")
    return sites
