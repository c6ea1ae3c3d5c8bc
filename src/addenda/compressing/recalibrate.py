"""Batch norms gather their statistics anew, after the layers before them have changed."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.arguments import check_batches, checked
from addenda.core.base.errors import AddendaError
from addenda.core.modules.statistics import gathering


@checked()
@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of all batch norms by the mean over these batches'; return how many norms.

    batches: what the model is called with: tensors, mappings (keywords), or tuples whose first entry is a tensor
    (labels behind it are left aside). The whole model is otherwise in evaluation mode, and no weight is touched. Raises
    AddendaError where there is no batch, or where statistics come out not finite; the old ones are back then.
    """
    check_batches("batches", batches)
    norms = {
        path: m for path, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    }  # fmt: skip
    with gathering(model):
        _gather(model, norms, batches)
    return len(norms)


def _gather(model: nn.Module, norms: dict[str, Any], batches: Iterable[Any]) -> None:
    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    states = {path: ({k: b.clone() for k, b in m.named_buffers()}, m.momentum) for path, m in norms.items()}
    success = False
    try:
        model.eval()
        for m in norms.values():
            m.reset_running_stats()
            m.momentum = None  # a plain mean over batches
            m.train()
        count = 0
        for batch in batches:
            count += 1
            if norms:
                _call(model, batch, device)
        if not count:
            raise AddendaError("Batch norms are recalibrated on batches, and none came. Pass some training images.")
        paths = [p for p, m in norms.items() if not all(bool(torch.isfinite(b).all()) for b in m.buffers())]
        if paths:
            raise AddendaError(
                f"The statistics of {len(paths)} batch norms are not finite on these batches, {paths[0]} first. Look "
                "at the batches, and at the layers before it."
            )
        success = True
    finally:
        for path, m in norms.items():
            buffers, m.momentum = states[path]
            if not success:
                for name, b in m.named_buffers():
                    b.copy_(buffers[name])
        for m, mode in modes:
            m.training = mode


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Tensor):
        model(batch.to(device))
    elif isinstance(batch, Mapping):
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        model(batch[0].to(device))
    else:
        raise AddendaError(
            f"A batch is a tensor, a mapping of keywords or a tuple that begins with a tensor; got a "
            f"{type(batch).__name__}."
        )
