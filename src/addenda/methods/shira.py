"""SHiRA: ΔW is sparse, 1-2 % of the entries (Bhardwaj et al. 2024, arXiv 2406.13175).

    ΔW[i, j] = value of (i, j) on a fixed mask of K = density · m · n positions, 0 elsewhere

The masks of the paper: "magnitude" (the K largest |W|), "random", "struct" (whole rows and columns and the diagonal),
"gradient" (the K largest Σ|G| over calibration batches) and "snip" (the K largest |W ∘ ΣG|). The paper leaves open how
batches are combined: here |G| is summed for "gradient", as a measure of how often an entry is wanted, and G itself for
"snip", as in SNIP (Lee et al. 2018). Ties fall to the lower flat index. Every site draws a mask of its own.
Not of the paper: "block" takes whole blocks of b × b entries, those with the largest Σ|W|. Its gradients need products
of that size only; every other mask needs the dense product that full fine-tuning needs. "given" holds positions in the
adapter's file, as who made it gave them (a reduction of another change, an imported one); a fresh start draws them.
count is K itself, in the place of the density.

Cost: K numbers a site. The change may have full rank. Low density and few steps favour it; struct masks did badly on
language in the paper.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.base.largest import largest, narrow
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params, Shape, WeightMethod

_WHOLE = {"struct": "whole rows and columns", "block": "whole blocks"}


@register(
    "shira",
    title="SHiRA",
    paper="Bhardwaj et al. 2024, arXiv:2406.13175",
    equation="ΔW = scatter(values at K fixed positions)",
    hypothesis="Changing one weight in a hundred, chosen beforehand, is enough; the change needs no low rank.",
    family="sparse",
    rate=3e-3,
    published="LLaMA-7B, mean of 8 commonsense tasks: LoRA 74.7, SHiRA magnitude 77.0, DoRA 78.1; LLaMA-2-7B: LoRA "
    "77.61, SNIP mask 79.28 (paper, which trains SHiRA at 5e-4 and the others at 2e-4, and shows no full "
    "fine-tuning). PEFT's own benchmark, Llama-3.2-3B, GSM8K: random mask 0.510, LoRA r = 32 0.478.",
    paper_setting="1 to 2 % of q, k, v, up and down (here 1 % of every linear layer), rate 5e-4; gradient and SNIP "
    "masks did best.",
)
@dataclass(frozen=True)
class SHiRA(WeightMethod):
    """density: the share of entries that are trained, or count: their number K. mask: how they are chosen, see the
    module. block: the side b."""

    sized_by: ClassVar[str] = "density"
    density: float = 0.01
    mask: Literal["magnitude", "random", "struct", "gradient", "snip", "block", "given"] = "magnitude"
    block: int = 32
    count: int | None = None

    def validate(self):
        if not 0 < self.density <= 1:
            yield f"density must be in (0, 1], got {self.density}"
        if self.block < 1:
            yield f"block must be at least 1, got {self.block}"
        if self.count is not None and self.count < 1:
            yield f"count must be at least 1, got {self.count}"
        if self.count is not None and self.mask in ("struct", "block"):
            yield f"count is of single entries, and mask={self.mask!r} takes {_WHOLE[self.mask]}; use density"

    def has(self, hook: str) -> bool:
        return super().has(hook) and (hook != "blocks" or self.mask == "block")

    @property
    def calibration(self) -> Literal["gradient"] | None:
        return "gradient" if self.mask in ("gradient", "snip") else None

    def calibrate(self, W: Tensor, G: Tensor, seen: Tensor | None) -> Tensor:
        G = G.abs() if self.mask == "gradient" else G
        return G.clone() if seen is None else seen + G

    def check(self, m: int, n: int) -> str | None:
        if self.mask == "block" and (m % self.block or n % self.block):
            return f"block={self.block} does not divide both of {m} × {n}"
        if self.count is not None and self.count > m * n:
            return f"count={self.count} is above {m} × {n}"
        if self.mask == "struct" and self.density * m * n < min(m, n):
            return f"a struct mask holds the diagonal: density must be at least {min(m, n) / (m * n):.2g} at {m} × {n}"
        return None

    def derive(self, W: Tensor, rng: Stream) -> Params:
        m, n = W.shape
        if self.mask == "random":
            return {"index": rng.choice(m * n, self.trainable(m, n)).int()}
        if self.mask == "struct":
            return {"index": _struct(m, n, *self._lines(m, n), rng).int()}
        if self.mask == "block":
            score = W.abs().view(m // self.block, self.block, n // self.block, self.block).sum((1, 3))
            return {"index": largest(score, self._blocks(m, n)).int()}
        return {"index": largest(W.abs(), self.trainable(m, n)).int()} if self.mask == "magnitude" else {}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        K = self.trainable(*W.shape)
        own: Params = {"values": nn.Parameter(torch.zeros(K))}  # of "block": block after block, b × b each
        if self.mask == "given":
            own["index"] = narrow(rng.choice(W.numel(), K), W.numel())
        if self.mask == "gradient":
            own["index"] = largest(p["calibration"], K).int()
        if self.mask == "snip":
            own["index"] = largest((W * p["calibration"]).abs(), K).int()
        return own

    def sparse(self, p: Params, shape: Shape) -> tuple[Tensor, Tensor]:
        if self.mask != "block":
            return p["index"], p["values"]
        rows, columns, values = self.blocks(p, shape)
        side = torch.arange(self.block, device=rows.device)
        row = (rows[:, None, None] * self.block + side[:, None]) * shape[1]
        index, order = (row + columns[:, None, None] * self.block + side).flatten().sort()
        return index, values.flatten()[order]

    def blocks(self, p: Params, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        across = shape[1] // self.block
        return p["index"] // across, p["index"] % across, p["values"].view(-1, self.block, self.block)

    def delta(self, W: Tensor, p: Params) -> Tensor:
        index, values = self.sparse(p, W.shape)
        return W.new_zeros(W.numel()).index_put((index,), values).view(W.shape)

    def effective(self, W: Tensor, p: Params) -> Tensor:
        index, values = self.sparse(p, W.shape)
        return W.flatten().index_put((index,), values, accumulate=True).view(W.shape)

    def trainable(self, m: int, n: int) -> int:
        if self.mask == "block":
            return self._blocks(m, n) * self.block**2
        if self.mask == "struct":
            rows, columns = self._lines(m, n)
            return rows * n + columns * m - rows * columns + min(m, n) - rows - columns
        return self.count or max(1, round(self.density * m * n))

    def _blocks(self, m: int, n: int) -> int:
        return max(1, round(self.density * m * n / self.block**2))

    def _lines(self, m: int, n: int) -> tuple[int, int]:
        """How many whole rows and columns fit beside the diagonal, taken in turn, never above the budget."""
        budget, k = round(self.density * m * n) - min(m, n), min(m, n)
        rows = min(k // 2, budget // max(1, m + n - 2))
        columns = min(k - rows, max(0, budget - rows * (n - 1)) // max(1, m - 1 - rows))
        return rows, min(columns, rows)


def _struct(m: int, n: int, rows: int, columns: int, rng: Stream) -> Tensor:
    """Flat positions of whole rows and columns and the main diagonal; no two lines cross on the diagonal."""
    k = min(m, n)
    lines = rng.choice(k, rows + columns)
    first = rng.choice(rows + columns, rows)
    is_row = torch.zeros(rows + columns, dtype=torch.bool).index_fill(0, first, True)
    mask = torch.eye(m, n, dtype=torch.bool)
    mask[lines[is_row]] = True
    mask[:, lines[~is_row]] = True
    return torch.nonzero(mask.flatten()).flatten()
