"""A layer whose rows are groups, each with a thin change of its own: one base product, and batched thin ones.

    y = x Wᵀ + bias;   of group g:   y_g += (x_g ⊙ mask_g) A_gᵀ B_gᵀ

It keeps for backward what `fused.factored_linear` keeps: the thin x Aᵀ, x only where some A learns, bits of what was
dropped. Groups of one size run as batched products (`baddbmm_` into y), others one after another.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from addenda.core.modules.returned import like


def batched_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, sizes: Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """Return y (…, m), whose rows are groups with a change each.

    Shapes: x (…, n); W (m, n); bias (m), of a frozen base, as W; B (G, m, r), A (G, r, n) in the dtype of x; sizes: G
    counts of x's rows, its leading dimensions flattened; mask: as x, False where the change does not see
    it; whoever drops a share p of x has divided A by 1 − p.
    """
    return like(x, _Batched.apply(x, W, bias, B, A, tuple(sizes), mask))


class _Batched(torch.autograd.Function):
    """The function of `batched_linear`."""

    @staticmethod
    def forward(ctx, x, W, bias, B, A, sizes, mask):
        need_b, need_a = ctx.needs_input_grad[3:5]
        rows = x.reshape(-1, x.shape[-1])
        h = _times(_seen(rows, mask), A.mT, sizes)
        y = F.linear(rows, W, bias)
        _add(y, h, B.mT, sizes)
        ctx.sizes = sizes
        ctx.save_for_backward(x if need_a else None, W, B, A, h if need_b else None, mask)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, W, B, A, h, mask = ctx.saved_tensors
        gx = gb = ga = None
        gh = _times(gy, B, ctx.sizes)
        if h is not None:
            gb = _outer(gy, h, ctx.sizes)
        if x is not None:
            ga = _outer(gh, _seen(x.reshape(-1, x.shape[-1]), mask), ctx.sizes)
        if ctx.needs_input_grad[0]:
            gx = gy @ W
            if mask is None:
                _add(gx, gh, A, ctx.sizes)
            else:
                gx.add_(_times(gh, A, ctx.sizes).mul_(mask.reshape(gx.shape)))
            gx = gx.view(ctx.shape)
        return gx, None, None, gb, ga, None, None


def _seen(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask.reshape(rows.shape)


def _even(sizes: Sequence[int]) -> bool:
    return len(set(sizes)) == 1


def _times(t: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return t_g right_g of every group, (rows, k). t: (rows, j); right: (G, j, k)."""
    if _even(sizes):
        return torch.bmm(t.unflatten(0, (len(sizes), -1)), right).flatten(0, 1)
    return torch.cat([a @ b for a, b in zip(t.split(sizes), right, strict=True)])


def _add(y: Tensor, t: Tensor, right: Tensor, sizes: Sequence[int]) -> None:
    """Add t_g right_g of every group to y (rows, k), in place."""
    if _even(sizes):
        y.unflatten(0, (len(sizes), -1)).baddbmm_(t.unflatten(0, (len(sizes), -1)), right)
        return
    for out, a, b in zip(y.split(sizes), t.split(sizes), right, strict=True):
        out.addmm_(a, b)


def _outer(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return left_gᵀ right_g of every group, (G, j, k). left: (rows, j); right: (rows, k)."""
    if _even(sizes):
        return torch.bmm(left.unflatten(0, (len(sizes), -1)).mT, right.unflatten(0, (len(sizes), -1)))
    return torch.stack([a.t() @ b for a, b in zip(left.split(sizes), right.split(sizes), strict=True)])
