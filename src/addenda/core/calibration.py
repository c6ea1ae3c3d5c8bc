"""The pass over data that some methods want before training: gradients of the frozen base, one weight at a time."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from addenda.core.borrow import frozen, training_mode
from addenda.core.errors import AddendaError
from addenda.core.method import WeightMethod
from addenda.core.sites import Site


def calibrate(
    model: nn.Module,
    plan: list[tuple[Site, WeightMethod]],
    batches: Iterable | None,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
) -> dict[str, Tensor]:
    """What each calibrated method has accumulated over the batches, by path of the site.

    Every weight's gradient goes to its method as soon as it is complete and is dropped at once, so that at most one
    dense gradient lives at a time beside the accumulators. Flags and `.grad` are as before at the end.
    Raises AddendaError when data is missing or empty, or a site gets no gradient.
    """
    sites = {site.path: (site, m) for site, m in plan if m.calibration is not None}
    if not sites:
        return {}
    if batches is None:
        kinds = ", ".join(dict.fromkeys(m.name for _, m in sites.values()))
        raise AddendaError(
            f"{kinds} with these options looks at data before training: give attach(..., calibration=batches), "
            "a list of dicts for model(**batch), or of anything with loss=function(model, batch)."
        )
    seen: dict[str, Tensor] = {}
    count = 0
    with frozen(model), training_mode(model, False):
        hooks = [_collect(site, m, seen) for site, m in sites.values()]
        try:
            for batch in batches:
                with torch.enable_grad():
                    (loss(model, batch) if loss else _default_loss(model, batch)).backward()
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    if not count:
        raise AddendaError("calibration= held no batch; at least one is needed.")
    missed = [path for path in sites if path not in seen]
    if missed:
        raise AddendaError(f"{len(missed)} sites got no gradient from the calibration data: {', '.join(missed[:8])}.")
    return seen


def _collect(site: Site, method: WeightMethod, seen: dict[str, Tensor]):
    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            W, G = site.matrix.to(wide), site.kind.to_matrix(weight.grad).to(wide)
            seen[site.path] = method.calibrate(W, G, seen.get(site.path))
        weight.grad = None

    site.weight.requires_grad_(True)
    return site.weight.register_post_accumulate_grad_hook(take)


def _default_loss(model: nn.Module, batch) -> Tensor:
    loss = getattr(model(**batch), "loss", None) if isinstance(batch, dict) else None
    if loss is None:
        raise AddendaError(
            "The calibration pass found no loss: batches must be dicts with labels for model(**batch).loss, "
            "or give loss=function(model, batch)."
        )
    return loss
