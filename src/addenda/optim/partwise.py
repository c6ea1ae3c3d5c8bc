"""AdamW that leaves parts alone which no gradient reached: for MoSA, whose step trains one part of a matrix of many.

    part k of a tensor: the entries that the method deals to k.  No gradient in any of them, in this step: its numbers,
    its moments and its step count stay as they are, bit for bit, and no weight decay acts on it.

Plain AdamW moves such entries on by momentum and decay. Here every part has its own count of steps for Adam's bias
correction, as if it were a tensor of its own. A part that a gradient reached moves as a whole. Tensors that are not
dealt out get plain AdamW, and so does everything else of the adapter, heads too.

Cost: AdamW's memory, and a few more passes over what is dealt out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from addenda.core.adapter import Adapter
from addenda.core.errors import AddendaError
from addenda.optim.pairs import groups_of, loss_of, plain_step, trained
from addenda.optim.registry import optimizer


@optimizer("partwise-adamw", paper="Zhang et al. 2023, arXiv:2312.02923")
class PartwiseAdamW(torch.optim.Optimizer):
    """AdamW that leaves parts of a tensor without a gradient entirely as they are."""

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
        self.parts: list[tuple[Tensor, Tensor]] = []  # (trained, the part of each of its entries)
        for _, t in adapter.sites():
            dealt = t.method.dealt(t.tensors())
            self.parts += [(p, dealt[k]) for k, p in t.named_parameters() if k in dealt and p.requires_grad]
        if not self.parts:
            raise AddendaError(
                f"'partwise-adamw' trains tensors whose entries are dealt out to parts, and adapter {adapter.name!r} "
                f"({adapter.kinds}) has none. Take 'adamw'."
            )
        own = [p for p, _ in self.parts]
        rest = trained(adapter, own)
        super().__init__(*groups_of(own, rest, rate, weight_decay, betas=(beta1, beta2), eps=eps))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the parts that have a gradient, and of everything that is not dealt out."""
        loss = loss_of(closure)
        dealt, *others = self.param_groups
        for p, part in self.parts:
            if p.grad is not None:
                self._move(p, p.grad, part, dealt)
        for group in others:
            plain_step(self, group)
        return loss

    def _move(self, p: Tensor, g: Tensor, part: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["steps"] = torch.zeros(int(part.max()) + 1, dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        reached = torch.bincount((part * (g != 0)).flatten(), minlength=len(state["steps"])) > 0
        (beta1, beta2), rate = group["betas"], group["lr"]
        for k in reached[1:].nonzero()[:, 0].add(1).tolist():  # 0 stands for entries without a gradient
            state["steps"][k] += 1
            on, n = (part == k).to(p.dtype), float(state["steps"][k])
            first = state["exp_avg"].lerp_(g, (1 - beta1) * on)
            second = state["exp_avg_sq"].lerp_(g * g, (1 - beta2) * on)
            if group["weight_decay"]:
                p.mul_(1 - rate * group["weight_decay"] * on)
            size = (second / (1 - beta2**n)).sqrt_().add_(group["eps"])
            p.addcdiv_(first * on, size, value=-rate / (1 - beta1**n))
