"""Changes made to a model for a short look at it, and taken back afterwards: modes, flags, gradients."""

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
    """Decorate a function of a model to run inside `torch.inference_mode` exactly where the model was made in it.

    Tensors made in `torch.inference_mode` can never be trained, and those of a model that was made there can only be
    written there; so the function runs inside or outside as the model was made, and not as its caller happens to be.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        argument: Any = args[0] if args else kwargs.get("model", kwargs.get("adapter"))
        model = argument if isinstance(argument, nn.Module) else getattr(argument, "model", None)
        inference = isinstance(model, nn.Module) and any(
            not nn.parameter.is_lazy(p) and p.is_inference() for p in model.parameters()
        )
        if not isinstance(model, nn.Module) or inference == torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(inference):
            return function(*args, **kwargs)

    return run


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the whole model in training or evaluation mode for a `with` block, and give every module its flag back.

    What modules gather about their inputs (batch norms) stays as it is, whoever asks for another mode meanwhile.
    """
    flags = [(m, mode_of(m)) for m in model.modules()]
    with holding(model):
        model.train(training)
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter for a `with` block, without gradients; flags and `.grad` come back afterwards."""
    states = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in states:
        p.requires_grad_(False)
        p.grad = None
    try:
        yield
    finally:
        for p, flag, grad in states:
            p.requires_grad_(flag)
            p.grad = grad


@contextmanager
def gradient_from(*modules: nn.Module) -> Iterator[None]:
    """Make the outputs of these modules require a gradient in a `with` block, wherever gradients are recorded."""
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
    """Return, in a list, the embedding of tokens or patches that a model's inputs pass first; empty without one."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # a convolutional model: its first layer
        embedding = next((m for m in model.modules() if m._parameters and not m._modules), None)
    return [embedding] if isinstance(embedding, nn.Module) else []
