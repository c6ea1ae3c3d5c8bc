"""The pass over data that some methods want before training: gradients of the frozen base, or the inputs of its layers.

Both are handed over one weight at a time. They are the base's own, whichever adapters act before and after.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.blocks import disabled
from addenda.core.base.arguments import check_batches
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.modules.borrow import frozen, training_mode
from addenda.core.modules.classes import original_class
from addenda.core.site.site import Site
from addenda.core.state.bypass import unnoticed, watching
from addenda.core.state.state import find_state


def calibrate(
    model: nn.Module,
    plan: list[tuple[Site, Method]],
    batches: Iterable | None,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what each calibrated method has accumulated over the batches, by path of the site.

    Every weight's gradient goes to its method as soon as it is complete and is dropped at once, so that at most one
    dense gradient lives at a time beside the accumulators. Inputs are seen in a forward pass, without the positions
    that a batch's attention_mask leaves out. Flags and `.grad` are as before at the end. The base alone acts meanwhile,
    as `attach` makes the new adapter alone act; who lets others act beside it switches them on afterwards.
    Raises AddendaError when data is missing or empty, a site gets no gradient, inputs are wanted of a layer that is no
    product with its last dimension, or a site's weight is read past its forward (`core.state.bypass`).
    """
    sites = {site.path: (site, m) for site, m in plan if m.calibration is not None}
    if not sites:
        return {}
    if batches is None:
        names = ", ".join(dict.fromkeys(m.name for _, m in sites.values()))
        raise AddendaError(
            f"{names} with these options looks at data before training: give attach(..., calibration=batches), "
            "a list of dicts for model(**batch), or of anything with loss=function(model, batch)."
        )
    check_batches("calibration=", batches)
    blind = [path for path, (site, m) in sites.items() if m.calibration == "input" and not site.kind.dense]
    if blind:
        raise AddendaError(
            f"{len(blind)} sites have no inputs to look at (only linear layers have): {', '.join(blind[:8])}. "
            "Leave them out with exclude=."
        )
    results: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]
    count, backward = 0, any(m.calibration == "gradient" for _, m in sites.values())
    alone = nullcontext() if find_state(model) is None else disabled(model)
    with frozen(model), training_mode(model, False), alone, ExitStack() as hooks:
        for site, m in sites.values():
            hook = _watch(site, m, results, mask) if m.calibration == "input" else _collect(site, m, results)
            hooks.callback(hook.remove)
        for batch in batches:
            mask[0] = batch.get("attention_mask") if isinstance(batch, dict) else None
            with nullcontext() if count else watching(site for site, _ in plan):
                _run(model, batch, count, loss, backward)
            count += 1
    if not count:
        raise AddendaError("calibration= held no batch; at least one is needed.")
    missed = [path for path in sites if path not in results or not results[path].any()]
    if missed:
        raise AddendaError(f"{len(missed)} sites got nothing from the calibration data: {', '.join(missed[:8])}.")
    wild = [path for path in sites if not torch.isfinite(results[path]).all()]
    if wild:
        raise AddendaError(f"The calibration data gives values that are not finite at {', '.join(wild[:8])}.")
    return results


def stand_in(method: Method, W: Tensor) -> Tensor | None:
    """Return a calibration of the right shape for `init` where no data is; None for methods without one."""
    return None if method.calibration is None else method.calibrate(W, W, None)


def _run(
    model: nn.Module, batch: Any, number: int, loss: Callable[[nn.Module, object], Tensor] | None, backward: bool
) -> None:
    """Run a batch forward, and backward where gradients are collected."""
    with torch.set_grad_enabled(backward):
        if loss is None and not backward:
            _outputs(model, batch, number)
            return
        value = loss(model, batch) if loss else _default_loss(model, batch, number)
        if backward:
            _number(value).backward()


def _watch(site: Site, method: Method, results: dict[str, Tensor], mask: list[Tensor | None]):
    def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        attention = mask[0]
        rows = x.reshape(-1, x.shape[-1])
        if attention is not None and attention.shape == x.shape[:-1]:
            rows = rows[attention.flatten().bool().to(rows.device)]
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad(), unnoticed():
            results[site.path] = method.calibrate(site.matrix.to(wide), rows.to(wide), results.get(site.path))

    return site.module.register_forward_pre_hook(take, with_kwargs=True)


def _collect(site: Site, method: Method, results: dict[str, Tensor]):
    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad(), unnoticed():
            W, G = site.matrix.to(wide), site.kind.to_matrix(weight.grad.to_dense()).to(wide)
            results[site.path] = method.calibrate(W, G, results.get(site.path))
        weight.grad = None

    site.weight.requires_grad_(True)
    return site.weight.register_post_accumulate_grad_hook(take)


def _number(loss: object) -> Tensor:
    """Return a loss that backward can begin from. Raises AddendaError where it is none."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    told = f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
    raise AddendaError(
        "The loss of a calibration batch is one number with a gradient, such as its mean over tokens. Return that from "
        f"loss=function(model, batch); got {told[:200]}."
    )


def _outputs(model: nn.Module, batch: Any, number: int) -> Any:
    """Return the outputs of a batch. Raises AddendaError where the model does not take it."""
    try:
        return model(**batch) if isinstance(batch, dict) else model(batch)
    except AddendaError:
        raise
    except Exception as error:
        told = next(iter(str(error).splitlines()), "").rstrip(".")
        raise AddendaError(
            f"Batch {number} of calibration= does not run through this {original_class(model).__name__}: "
            f"{type(error).__name__}: {told[:300]}. Give dicts for model(**batch), what model(batch) takes, or "
            "loss=function(model, batch)."
        ) from error


def _default_loss(model: nn.Module, batch: Any, number: int) -> Tensor:
    loss = getattr(_outputs(model, batch, number), "loss", None) if isinstance(batch, dict) else None
    if loss is None:
        raise AddendaError(
            "The calibration pass found no loss: batches must be dicts with labels for model(**batch).loss, "
            "or give loss=function(model, batch)."
        )
    return loss
