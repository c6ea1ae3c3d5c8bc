"""A block of a model with an adapter against the published order of computation, written out, in float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import addenda as ad

WIDTH = 8


def changed(model: nn.Module, method, **options) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model in float64 with an adapter that changes something, and its tensors site by site."""
    adapter = ad.attach(model.double().eval(), method, **options)
    g = torch.Generator().manual_seed(3)
    for p in adapter.parameters():
        p.data = p.data.double() + torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4
    return model, [dict(t._parameters) for _, t in adapter.sites()]  # pyright: ignore[reportReturnType]


def delta(p: dict[str, Tensor], x: Tensor, f: Callable = F.relu, s: float = 1.0) -> Tensor:
    """s (U f(D x + b) + c)."""
    return s * (f(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])


def same(model: nn.Module, block: nn.Module, reference: Callable[[Tensor], Tensor], tensors, *rest) -> None:
    """block(h) with the adapter is reference(h) without, and so are all gradients."""
    g = torch.Generator().manual_seed(4)
    h = torch.randn(2, 5, WIDTH, generator=g, dtype=torch.float64, requires_grad=True)
    G = torch.randn(2, 5, WIDTH, generator=g, dtype=torch.float64)
    leaves = [h, *(t for p in tensors for t in p.values())]

    def run(forward: Callable) -> list[Tensor]:
        y = forward(h, *rest)
        y = y[0] if isinstance(y, tuple) else y
        return [y, *torch.autograd.grad((y * G).sum(), leaves)]

    got = run(block)
    with ad.disabled(model):
        want, plain = run(lambda h, *_: reference(h)), block(h, *rest)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert (got[0] - (plain[0] if isinstance(plain, tuple) else plain)).abs().max() > 1e-3
