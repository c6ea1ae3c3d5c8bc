"""What the optimizers here share: sites whose change is a product of two thin factors, and one update of AdamW."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import FactorPair, Replace


@dataclass(frozen=True, eq=False)
class Paired:
    """A site whose method offers a pair: B moves with `left`, A with `right`. offset: as in PiSSA, B = B0 + left."""

    tensors: SiteTensors
    left: nn.Parameter
    right: nn.Parameter
    offset: bool

    @property
    def now(self) -> FactorPair:
        """The factors as they act now."""
        found = self.tensors.method.pair(self.tensors.tensors())
        assert found is not None
        return found

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.left, self.right


def paired(adapter: Adapter, optimizer: str) -> list[Paired]:
    """Return the sites with a pair, in the adapter's order. Raises AddendaError where there is none."""
    found = []
    for _, tensors in adapter.sites():
        pair = tensors.method.pair(tensors.tensors())
        if pair is not None:
            left, right = tensors._parameters[pair.left], tensors._parameters[pair.right]
            assert left is not None and right is not None
            found.append(Paired(tensors, left, right, pair.B is not left or pair.A is not right))
    if not found:
        raise AddendaError(
            f"{optimizer!r} trains the two thin factors of a change, and no site of adapter {adapter.name!r} "
            f"({adapter.kinds}) has them. Take 'adamw', or a method that has them, such as lora."
        )
    return found


def trained(adapter: Adapter, without: Sequence[Tensor] = ()) -> list[nn.Parameter]:
    """Return the parameters of the adapter that train, but for some."""
    left_out = {id(p) for p in without}
    return [p for p in adapter.parameters() if p.requires_grad and id(p) not in left_out]


def can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Return whether torch has one kernel for the whole of Adam's update of these."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def groups_of(
    adapter: Adapter, own: list, rest: list, rate: float, weight_decay: float, **more
) -> tuple[list[dict], dict]:
    """Return parameter groups and defaults for an optimizer that treats `own` its own way, `rest` as AdamW does."""
    groups: list[dict[str, Any]] = [{"params": own}, *by_decay(adapter, rest, weight_decay)]
    return groups, {"lr": rate, "weight_decay": weight_decay, "fused": can_fuse(own + rest), **more}


def by_decay(adapter: Adapter, parameters: Sequence[nn.Parameter], weight_decay: float, **more) -> list[dict[str, Any]]:
    """Return parameters as groups of an optimizer: those that decay, and trained copies of vectors, which do not.

    Gains of norms and biases are copied whole (`core.method.contract.Replace`: also_train, full, ln-tuning, bitfit), so
    decay would pull them to 0, and not to what the base has; transformers' Trainer leaves them out too. Every other
    vector of an adapter starts from the base. Without decay it is one group. more: further options of the groups.
    """
    kept = {id(p) for _, t in adapter.sites() if isinstance(t.method, Replace) for p in t.parameters() if p.dim() < 2}
    decayed = [p for p in parameters if not weight_decay or id(p) not in kept]
    rest = [p for p in parameters if weight_decay and id(p) in kept]
    groups: list[dict[str, Any]] = [{"params": decayed, **more}, {"params": rest, "weight_decay": 0.0, **more}]
    return [g for g in groups if g["params"]]


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Return what a step's closure gives, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def adam(
    values: Sequence[Tensor], grads: Sequence[Tensor], states: list[dict], group: dict, rate: float, decay: float = 0.0
) -> None:
    """Make one update of AdamW, in place, by torch's own kernels. states: step and moments, made where missing."""
    for g, state in zip(grads, states, strict=True):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=g.device if group["fused"] else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
    first, second, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = group["betas"]
    adamw(
        list(values), list(grads), first, second, [], steps, fused=group["fused"], foreach=not group["fused"],
        amsgrad=False, beta1=beta1, beta2=beta2, lr=rate, weight_decay=decay, eps=group["eps"], maximize=False,
    )  # fmt: skip


def plain_step(optimizer: torch.optim.Optimizer, group: dict) -> None:
    """Take a step of AdamW for all parameters of a group that have a gradient."""
    live = [p for p in group["params"] if p.grad is not None]
    adam(live, [p.grad for p in live], [optimizer.state[p] for p in live], group, group["lr"], group["weight_decay"])
