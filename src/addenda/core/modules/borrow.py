"""What a passing look at a model changes on it, and gives back."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from addenda.core.modules.statistics import holding, mode_of

P = ParamSpec("P")
R = TypeVar("R")


def in_its_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: what a function makes or writes on a model, its first argument, is of the kind of the model's tensors.

    Tensors made in `torch.inference_mode` can never be trained, and those of a model that was made there can only be
    written there; so the function runs inside or outside as the model was made, and not as its caller happens to be.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = args[0] if args else kwargs.get("model", kwargs.get("adapter"))
        model = given if isinstance(given, nn.Module) else getattr(given, "model", None)
        own = isinstance(model, nn.Module) and any(
            not nn.parameter.is_lazy(p) and p.is_inference() for p in model.parameters()
        )
        if not isinstance(model, nn.Module) or own == torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(own):
            return function(*args, **kwargs)

    return run


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in training or evaluation mode, and every module's own flag back afterwards.

    What modules gather about their inputs (batch norms) stays as it is, whoever asks for another mode meanwhile.
    """
    before = [(m, mode_of(m)) for m in model.modules()]
    with holding(model):
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


def _wants_gradient(module: nn.Module, args: tuple, y: Any) -> None:
    first: Tensor = y[0] if isinstance(y, tuple) else y  # some patch embeddings return their grid too
    if torch.is_grad_enabled() and not first.requires_grad:
        first.requires_grad_()


def entrance(model: nn.Module) -> list[nn.Module]:
    """What a transformers model's inputs pass first: the embedding of tokens or patches; empty for another model."""
    try:
        found = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # a convolutional model: its first layer
        found = next((m for m in model.modules() if m._parameters and not m._modules), None)
    return [found] if isinstance(found, nn.Module) else []
