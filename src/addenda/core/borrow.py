"""What a passing look at a model changes on it, and gives back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in training or evaluation mode, and every module's own flag back afterwards."""
    before = [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient or holds one; flags and `.grad` are as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in before:
        p.requires_grad_(False)
        p.grad = None
    try:
        yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad


@contextmanager
def gradient_from(*modules: nn.Module) -> Iterator[None]:
    """What these modules return requires a gradient, wherever gradients are recorded at all."""
    hooks = [module.register_forward_hook(_wants_gradient) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _wants_gradient(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    return y if y.requires_grad or not torch.is_grad_enabled() else y.requires_grad_()
