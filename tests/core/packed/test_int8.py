"""int8 rows against a rounding written out, and the count of its bits."""

import math

import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.core.packed.int8 import Int8Tensor


@pytest.mark.parametrize("shape", [(6, 50), (4, 3, 5), (7,)])
def test_every_row_has_its_own_scale(shape):
    W = torch.randn(shape) * torch.logspace(-6, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    W[2] = 0
    held = Int8Tensor.of(W)
    wanted = torch.stack([(row / (s := max(float(row.abs().max()) / 127, 1e-30))).round() * s for row in W])
    torch.testing.assert_close(held.dense(), wanted, rtol=1e-5, atol=0)
    assert held.bits == pytest.approx(8 + 32 * len(W) / W.numel())
    error = (held.dense() - W).abs().view(len(W), -1).amax(1)
    assert bool((error <= W.abs().view(len(W), -1).amax(1) * 0.5001 / 127).all())
    torch.testing.assert_close(Int8Tensor.of(held.dense()).codes, held.codes)
    W[0] = math.inf
    with pytest.raises(AddendaError, match="not finite; int8"):
        Int8Tensor.of(W)
