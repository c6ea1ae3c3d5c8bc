"""An L1 pull of a run's change towards zero: l1 · mean |θ − θ0| over the numbers that an adapter trains.

Its gradient, l1 / N · sign(θ − θ0), is added as the optimizer steps: clipping does not see it, nor does the loss that
is told. Whole copies are pulled towards the base's values, other changes towards 0; heads not at all.
"""

from typing import Any

import torch

from addenda.core.adapter.handle import Adapter
from addenda.core.site.site import owners_of, site_at
from addenda.core.state.state import record_of
from addenda.optim.registry import Optimizers, named


def pulled(given: str | Optimizers, adapter: Adapter, l1: float, steps: Any = None) -> str | Optimizers:
    """Return what `fit` takes as its optimizer, with a pull; as it was given where l1 is 0.

    steps: how many, or the rows of each, for optimizers with a schedule.
    """
    if not l1:
        return given
    label, make = named(given, adapter, steps if isinstance(steps, int) else len(steps))

    def made(adapter: Adapter, rate: float, weight_decay: float) -> torch.optim.Optimizer:
        optimizer = make(adapter, rate, weight_decay)
        optimizer.register_step_pre_hook(lambda *_: pull(adapter, l1))
        return optimizer

    made.__qualname__ = f"{label} with a pull of l1={l1!r}"  # by which a run is known again
    return made


@torch.no_grad()
def pull(adapter: Adapter, l1: float) -> None:
    """Add the pull's gradient to those of the adapter's tensors."""
    heads = set(record_of(adapter.model, adapter.name).record.also_train)
    owners = owners_of(adapter.model)
    trained = [(path, t) for path, t in adapter.sites() if path not in heads]
    share = l1 / sum(p.numel() for _, t in trained for p in t._parameters.values() if p is not None)
    for path, tensors in trained:
        for key, p in tensors._parameters.items():
            if p is None or p.grad is None:
                continue
            whole = key == "value" and tensors.method.any_shape  # a copy, not a change
            change = p - site_at(adapter.model, path, owners).matrix if whole else p
            p.grad.add_(change.sign().to(p.grad.dtype), alpha=share)
