"""AdamW for tensors in units, where a unit without a gradient stays entirely as it is: what two optimizers share.

No gradient in a unit, in this step: its numbers, its moments and its step count stay, bit for bit, and no weight decay
acts on it. Plain AdamW moves such units on by momentum and decay. A unit that a gradient reached moves as a whole, and
counts its own steps for Adam's bias correction, as if it were a tensor of its own. Trainable tensors of the adapter
that have no units get plain AdamW, heads too.

Cost: AdamW's memory, and a few more passes over what has units.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from addenda.core.adapter.handle import Adapter
from addenda.optim.pairs import groups_of, loss_of, plain_step, trained


class Reached(torch.optim.Optimizer):
    """An AdamW that moves only the units of a tensor that have a gradient; a subclass says what the units are."""

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
        own = self.take(adapter)
        super().__init__(
            *groups_of(adapter, own, trained(adapter, own), rate, weight_decay, betas=(beta1, beta2), eps=eps)
        )

    def take(self, adapter: Adapter) -> list[Tensor]:
        """Return the tensors that have units. Raises AddendaError where there is none."""
        raise NotImplementedError

    def moves(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Yield (a tensor; 1 where it moves, else 0, in its dtype; its steps there, from 1 on) of every update."""
        raise NotImplementedError

    def steps(self, p: Tensor, units: int) -> Tensor:
        """Return how often each unit of p moved, (units) float32; made with its moments where missing."""
        state = self.state[p]
        if not state:
            state["steps"] = torch.zeros(units, dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state["steps"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step of the units that have a gradient, and of everything without units."""
        loss = loss_of(closure)
        own, *others = self.param_groups
        (beta1, beta2), rate = own["betas"], own["lr"]
        for p, on, n in self.moves():
            state, g, bias = self.state[p], p.grad, 1 - beta1**n
            assert g is not None
            first = state["exp_avg"].lerp_(g, (1 - beta1) * on)
            second = state["exp_avg_sq"].lerp_(g * g, (1 - beta2) * on)
            if own["weight_decay"]:
                p.mul_(1 - rate * own["weight_decay"] * on)
            size = (second * (bias**2 / (1 - beta2**n))).sqrt_().add_(own["eps"] * bias)  # Adam's, times bias
            p.addcdiv_(first * on, size, value=-rate)
        for group in others:
            plain_step(self, group)
        return loss
