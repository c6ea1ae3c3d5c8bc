"""AdamW that leaves alone what got no gradient: for DyLoRA with `frozen`, whose step trains one rank of many.

    unit i of a pair: row i of A and column i of B.  No gradient in it, in this step: its numbers, its moments and its
    step count stay as they are, bit for bit, and no weight decay acts on it.

Plain AdamW moves such units on by momentum and decay. Where all units have a gradient it is AdamW. The rest, and what
it costs, is in `optim.reached`.
"""

from collections.abc import Iterator

from torch import Tensor

from addenda.core.adapter.handle import Adapter
from addenda.optim.pairs import paired
from addenda.optim.reached import Reached
from addenda.optim.registry import optimizer


@optimizer("rowwise-adamw", paper="Valipour et al. 2022, arXiv:2210.07558")
class RowwiseAdamW(Reached):
    """AdamW that leaves ranks without a gradient entirely as they are."""

    def take(self, adapter: Adapter) -> list[Tensor]:
        self.sites = [s for s in paired(adapter, "rowwise-adamw") if any(p.requires_grad for p in s.parameters)]
        return [p for s in self.sites for p in s.parameters]

    def moves(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield one update for each factor, of all its reached units: none waits for another, or for the host."""
        for site in self.sites:
            there = [(p, p.grad, -2 if p is site.left else -1) for p in site.parameters if p.grad is not None]
            live = [(g != 0).any(within) for _, g, within in there]
            for p, _, within in there:
                on = live[0] if len(live) == 1 else live[0] | live[1]
                steps = self.steps(p, len(on)).add_(on)
                yield p, on.unsqueeze(within).to(p.dtype), steps.clamp_min(1).unsqueeze(within)
