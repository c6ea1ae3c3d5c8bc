"""AdaLoRA's training: a budget of ranks, handed out anew as the run goes on (Zhang et al. 2023, arXiv 2303.10512).

    ΔW = s B diag(E) A at every site; the i-th triplet is row i of A, E_i, column i of B.  Each step:

    1. loss + penalty · mean over all A and B of ‖A Aᵀ − I‖, ‖Bᵀ B − I‖ (Frobenius)     its gradient is added to .grad
    2. AdamW
    3. I = |w · gradient|,  Ī = β Ī + (1 − β) I,  Ū = β Ū + (1 − β) |I − Ī|     for every number w of A, B and E
       score of a triplet: Ī Ū of E_i + mean of Ī Ū over row i of A + mean over column i of B
    4. every few steps E_i = 0 at the lowest scores of all sites together, so that the budget stays

The budget falls from the sum of the ranks to that of the target ranks, after a share `start` of the run and before its
last share `end`, by a cubic curve. What was set to 0 still gets gradients and can come back until `end`; from there on
scores stand still and every step keeps the same triplets.

As in PEFT and the authors' code the norm in the penalty is not squared; the paper's formula is the squared one, whose
pull fades near orthogonality. Importance is taken after the update, as there, so a triplet at 0 is seen again. Exactly
as many triplets go as the budget says, where PEFT drops all that tie with the last. A trainer's clipping comes before
the penalty and does not see it.

Cost: four numbers of state for every trained one, twice AdamW's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import spread, whole
from addenda.core.forward.tensors import SiteTensors
from addenda.optim.pairs import by_decay, can_fuse, loss_of, plain_step, trained
from addenda.optim.registry import optimizer

NAMES = ("A", "B", "E")


@optimizer("adalora", paper="Zhang et al. 2023, arXiv:2303.10512")
class BudgetedAdamW(torch.optim.Optimizer):
    """AdamW, a pull to orthogonal factors, and AdaLoRA's budget of ranks over all sites.

    steps: the length of the run. start, end, every, penalty: see the module. beta_importance, beta_uncertainty: β of
    the two running means.
    """

    def __init__(
        self,
        adapter: Adapter,
        rate: float,
        weight_decay: float = 0.0,
        *,
        steps: int,
        start: float = 0.1,
        end: float = 0.3,
        every: int = 10,
        penalty: float = 0.5,
        beta_importance: float = 0.85,
        beta_uncertainty: float = 0.85,
    ):
        self.sites = [t for _, t in adapter.sites() if _has_triplets(t)]
        if not self.sites:
            raise AddendaError(
                f"'adalora' hands out ranks of B diag(E) A, and no site of adapter {adapter.name!r} ({adapter.kinds}) "
                "has these tensors, a rank and a target_rank. Attach the method 'adalora', or take 'adamw'."
            )
        ranks = [_ranks(t) for t in self.sites]
        self.full, self.target = (sum(each) for each in zip(*ranks, strict=True))
        problems = []
        if any(target > full for full, target in ranks):
            problems.append("a target_rank at most as high as the rank that it starts from")
        if not (start >= 0 and end >= 0 and start + end < 1):
            problems.append(f"start and end, shares of the run, with start + end below 1, got {start} and {end}")
        if steps < 1 or every < 1 or penalty < 0:
            problems.append(f"steps and every from 1, penalty from 0, got {steps}, {every} and {penalty}")
        if not (0 < beta_importance < 1 and 0 < beta_uncertainty < 1):
            problems.append(f"both β between 0 and 1, got {beta_importance} and {beta_uncertainty}")
        if problems:
            raise AddendaError(f"adalora wants {'; '.join(problems)}.")
        self.steps, self.every, self.penalty = steps, every, penalty
        self.warmup, self.fixed = round(start * steps), steps - round(end * steps)
        self.betas = (beta_importance, beta_uncertainty)
        own = trained(adapter)
        options = {"lr": rate, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8, "taken": 0}
        super().__init__(by_decay(adapter, own, weight_decay), options | {"fused": can_fuse(own)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step, of the factors and of the budget."""
        loss = loss_of(closure)
        group, *others = self.param_groups
        group["taken"] += 1
        if self.penalty:
            self._pull()
        for each in (group, *others):
            plain_step(self, each)
        if group["taken"] < self.fixed:
            self._look()
        self._allocate(group["taken"])
        return loss

    def budget(self, step: int) -> int:
        """Return how many triplets may live after a step (1, 2, …)."""
        if step <= self.warmup:
            return self.full
        if step >= self.fixed:
            return self.target
        left = 1 - (step - self.warmup) / (self.fixed - self.warmup)
        return self.target + int((self.full - self.target) * left**3)

    def _pull(self) -> None:
        """Add the penalty's gradient, 2 penalty (M Mᵀ − I) M / ‖M Mᵀ − I‖ over their number for M = A and Bᵀ."""
        factors = [(t.get_parameter(k), k == "B") for t in self.sites for k in ("A", "B")]
        count = sum(math.prod(p.shape[:-2]) for p, _ in factors)  # a stack of experts has several
        alike: dict[tuple, list[tuple[Tensor, bool]]] = {}
        for p, turned in factors:
            if p.grad is not None:
                alike.setdefault((p.mT.shape if turned else p.shape, p.device), []).append((p, turned))
        for group in alike.values():
            values = [whole(p) for p, _ in group]
            M = torch.stack([w.mT if turned else w for w, (_, turned) in zip(values, group, strict=True)])
            off = M @ M.mT - torch.eye(M.shape[-2], dtype=M.dtype, device=M.device)
            size = torch.linalg.matrix_norm(off, keepdim=True).clamp_min(torch.finfo(M.dtype).tiny)
            pull = (2 * self.penalty / count) * (off / size) @ M
            for (p, turned), g in zip(group, pull, strict=True):
                assert p.grad is not None
                p.grad.add_(spread(g.mT if turned else g, p))

    def _look(self) -> None:
        """Update the running means of importance and of its change, for every number of every triplet."""
        for t in self.sites:
            for p in map(t.get_parameter, NAMES):
                if p.grad is None:
                    continue
                state, now = self.state[p], (p * p.grad).abs()
                if "importance" not in state:
                    state["importance"], state["uncertainty"] = torch.zeros_like(p), torch.zeros_like(p)
                mean = state["importance"].lerp_(now, 1 - self.betas[0])
                state["uncertainty"].lerp_((now - mean).abs(), 1 - self.betas[1])

    def _allocate(self, step: int) -> None:
        """Set the E of the lowest scores to 0, where the schedule says so."""
        surplus = self.full - self.budget(step)
        if not surplus or (step % self.every and step < self.fixed):
            return
        scores = [self._score(t).flatten() for t in self.sites]
        order = torch.cat([s.to(scores[0].device) for s in scores]).argsort(stable=True)
        lowest = torch.zeros(self.full, dtype=torch.bool, device=order.device).index_fill_(0, order[:surplus], True)
        for t, out in zip(self.sites, lowest.split([s.numel() for s in scores]), strict=True):
            E = t.get_parameter("E")
            E.masked_fill_(spread(out.view(E.shape).to(E.device), E), 0)

    def _score(self, t: SiteTensors) -> Tensor:
        """Return the importance of every triplet of a site (…, r)."""
        A, B, E = (self._sensitivity(t.get_parameter(k)) for k in NAMES)
        return E.view(A.shape[:-1]) + A.mean(-1) + B.mean(-2)

    def _sensitivity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        known = state["importance"] * state["uncertainty"] if "importance" in state else torch.zeros_like(p)
        return whole(known)


def _has_triplets(t: SiteTensors) -> bool:
    has_ranks = hasattr(t.method, "rank") and hasattr(t.method, "target_rank")
    return has_ranks and set(NAMES) <= t._parameters.keys()


def _ranks(t: SiteTensors) -> tuple[int, int]:
    """Return the numbers of triplets at the start and at the end, all matrices of a stack together."""
    method: Any = t.method
    count = t.get_parameter("E").numel()
    return count, count // method.rank * method.target_rank
