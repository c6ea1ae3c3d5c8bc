"""AdamW that leaves alone what got no gradient: for DyLoRA with `frozen`, whose step trains one rank of many.

    unit i of a pair: row i of A and column i of B.  No gradient in it, in this step: its numbers, its moments and its
    step count stay as they are, bit for bit, and no weight decay acts on it.

Plain AdamW moves such units on by momentum and decay. Every unit counts its own steps for Adam's bias correction. Where
all units have a gradient it is AdamW. Trainable tensors that belong to no pair get plain AdamW.

Cost: AdamW's memory, and a few more passes over the factors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from addenda.core.adapter import Adapter
from addenda.optim.pairs import groups_of, loss_of, paired, plain_step, trained
from addenda.optim.registry import optimizer


@optimizer("rowwise-adamw", paper="Valipour et al. 2022, arXiv:2210.07558")
class RowwiseAdamW(torch.optim.Optimizer):
    """AdamW that leaves ranks without a gradient entirely as they are."""

    def __init__(
        self,
        adapter: Adapter,
        rate: float,
        weight_decay: float = 0.0,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ):
        self.sites = [s for s in paired(adapter, "rowwise-adamw") if any(p.requires_grad for p in s.parameters)]
        own = [p for s in self.sites for p in s.parameters]
        rest = trained(adapter, own)
        super().__init__(*groups_of(own, rest, rate, weight_decay, betas=(beta1, beta2), eps=eps))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the units that have a gradient."""
        loss = loss_of(closure)
        pairs, *others = self.param_groups
        for site in self.sites:
            there = [p for p in site.parameters if p.grad is not None]
            live = [(p.grad != 0).any(-2 if p is site.left else -1) for p in there]
            for p in there:
                on = live[0] if len(live) == 1 else live[0] | live[1]
                self._move(p, on, pairs, -2 if p is site.left else -1)
        for group in others:
            plain_step(self, group)
        return loss

    def _move(self, p: Tensor, live: Tensor, group: dict, along: int) -> None:
        """live: which units; along: the dimension within a unit."""
        state, g = self.state[p], p.grad
        assert g is not None
        if not state:
            state["steps"] = torch.zeros(live.shape, dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["steps"] += live
        (beta1, beta2), on = group["betas"], live.unsqueeze(along).to(p.dtype)
        first = state["exp_avg"].lerp_(g, (1 - beta1) * on)
        second = state["exp_avg_sq"].lerp_(g * g, (1 - beta2) * on)
        steps = state["steps"].clamp_min(1).unsqueeze(along)
        p.mul_(1 - group["lr"] * group["weight_decay"] * on)
        size = on * group["lr"] / (1 - beta1**steps)
        p.sub_((size * first / ((second / (1 - beta2**steps)).sqrt() + group["eps"])).to(p.dtype))
