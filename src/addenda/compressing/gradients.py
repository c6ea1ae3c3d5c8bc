"""What a loss says of layers: how much each output row matters (FWSVD), and each layer as a whole (who gets rank).

Both look at the next token's cross-entropy, one sequence at a time.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import frozen, gradient_from, training_mode
from addenda.reducing.walk import Batch


def fisher(model: nn.Module, batches: list[Batch], weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return how much each output row matters: Σ over sequences and inputs of (∂loss/∂W)², (m) float64 by layer.

    loss: the mean cross-entropy of the next token of one sequence. One dense gradient lives at a time.
    Raises AddendaError where the model gives no such loss.
    """
    sums: dict[str, Tensor] = {}

    def collect(path: str, transposed: bool) -> Callable:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            square = weight.grad.double().square().sum(0 if transposed else 1)
            sums[path] = sums[path] + square if path in sums else square
            weight.grad = None

        return take

    with frozen(model), training_mode(model, False), ExitStack() as hooks:
        for path, weight in weights.items():
            weight.requires_grad_(True)
            transposed = not isinstance(model.get_submodule(path), nn.Linear)
            hooks.callback(weight.register_post_accumulate_grad_hook(collect(path, transposed)).remove)
        for row in _rows(model, batches):
            (_loss(model, row) / (row.shape[1] - 1)).backward()
    return sums


def weights_of(model: nn.Module, batches: list[Batch], paths: Iterable[str]) -> dict[str, float]:
    """Return how much the loss rises for a relative error of each layer's output, ½ E[‖y‖² ‖∂ℓ/∂y‖²] / m a token.

    To second order, with the Fisher information for the Hessian, an error δy of a token costs ½ E[(gᵀ δy)²], g = ∂ℓ/∂y,
    ℓ the sum of its sequence. Of an error that knows nothing of g's direction and is as large as a share e of ‖y‖²
    at every token, that is e times the number returned. Raises AddendaError as `fisher` does.
    """
    totals = dict.fromkeys(paths, 0.0)
    tokens = 0

    def watch(path: str) -> Callable:
        def take(module: nn.Module, args: tuple, y: Tensor) -> None:
            size, width = y.detach().float().square().sum(-1), y.shape[-1]

            def look(g: Tensor) -> None:  # without y in it: a tensor that its own hook holds is not let go
                totals[path] += float((size * g.float().square().sum(-1)).sum(dtype=torch.float64)) / (2 * width)

            y.register_hook(look)

        return take

    entry: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if entry is None:
        raise AddendaError(f"A {type(model).__name__} has no token embeddings to follow a gradient to.")
    with frozen(model), training_mode(model, False), gradient_from(entry), ExitStack() as hooks:
        for path in totals:
            hooks.callback(model.get_submodule(path).register_forward_hook(watch(path)).remove)
        for row in _rows(model, batches):
            tokens += row.shape[1]
            _loss(model, row).backward()
    return {path: total / tokens for path, total in totals.items()}


def _rows(model: nn.Module, batches: list[Batch]) -> Iterable[Tensor]:
    """Yield the sequences (1 × tokens), without padding."""
    device = next(p.device for p in model.parameters())
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield ids[mask.bool()][None].to(device)


def _loss(model: nn.Module, row: Tensor) -> Tensor:
    """Return the summed cross-entropy of a sequence's next tokens."""
    logits = getattr(model(input_ids=row), "logits", None)
    if logits is None or logits.dim() != 3:
        raise AddendaError("This wants the gradient of a loss, and only a causal LM has one from text.")
    return nn.functional.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="sum")
