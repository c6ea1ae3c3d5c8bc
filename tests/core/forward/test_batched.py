"""The batched thin products, against autograd on W + B A of every group."""

import pytest
import torch

from addenda.core.forward.batched import batched_linear


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 7, 3)])
@pytest.mark.parametrize("dropped", [False, True])
def test_outputs_and_gradients(sizes, dropped):
    torch.manual_seed(0)
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    W, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    B = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    A = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(12, 6) > 0.3 if dropped else None
    seen = x if mask is None else x * mask
    pieces = zip(x.split(sizes), seen.split(sizes), B, A, strict=True)
    want = torch.cat([a @ W.T + bias + s @ (b @ c).T for a, s, b, c in pieces])
    got = batched_linear(x.view(3, 4, 6), W, bias, B, A, sizes, mask).flatten(0, 1)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, B, A), g), torch.autograd.grad(want, (x, B, A), g), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
