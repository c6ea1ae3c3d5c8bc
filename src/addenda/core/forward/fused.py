"""Layers with a change inside their product: one autograd function for each form in which a method offers ΔW.

    factored_linear     a product of thin matrices, added to the base product's output in place
    block_linear        a few whole blocks, in products of their own size
    sparse_linear       single entries of one or several changes, written into a passing copy of W; their gradient is
                        gathered

Tensors of adapters may be float32 masters: they are cast for every product, and the input never is. Leading dimensions
of x are arbitrary; the functions return rows, which become the output outside of them (see `core.modules.returned`).
Gradients for W and the bias are there for unfrozen bases.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from addenda.core.method.contract import Factors, spread
from addenda.core.modules.returned import Unchanged, like


def factored_linear(
    x: Tensor, drop: float, W: Tensor, bias: Tensor | None, c: Tensor | None, factors: Factors
) -> Tensor:
    """Return y = x (W + ΔW)ᵀ + bias, where the factors' product is ΔW; with c, diag(c) stands before W + ΔW.

    Shapes: x (…, n); W (m, n) or any strided view of it; bias, c (m). drop: the share of x that ΔW does not see.
    """
    if torch.is_grad_enabled():
        y = FactoredLinear.apply(x, drop, W, bias, c, *factors)
    else:
        few = x.numel() < x.shape[-1] * len(factors.A)  # rows: to cast them takes less than to cast the factors
        wide = torch.promote_types(factors.A.dtype, x.dtype)
        y = _forward(x, drop, W, bias, c, *factors, dtype=wide if few else x.dtype)[0]
    return like(x, y)


def sparse_linear(x: Tensor, W: Tensor, bias: Tensor | None, entries: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return y = x (W + Σ scatter(values))ᵀ + bias.

    Shapes: x (…, n); W (m, n); entries: of each change (index, values), K of both, W's flat positions, each once.
    """
    # the None: torch._dynamo leaves out ctx where the arguments are as many as forward's names, the * counted as one
    return like(x, SparseLinear.apply(x, W, bias, None, *[t for pair in entries for t in pair]))


def block_linear(x: Tensor, W: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return y = x (W + ΔW)ᵀ + bias, where ΔW is K blocks, as in `WeightMethod.blocks`.

    Shapes: x (…, n); W (m, n); rows, columns (K), values (K, b, b).
    """
    return like(x, BlockLinear.apply(x, W, bias, rows, columns, values))


def _forward(x, drop, W, bias, c, B, A, middle, index, rows, sums, dtype=None):
    """Return the output's rows, and for backward factors in x's dtype, the thin intermediate and the dropout mask.

    dtype: of the thin products, if not x's.
    """
    dtype = dtype or x.dtype
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - drop) if drop else None
    A, left = A if sums else A.to(dtype), _scaled(B, rows, dtype)
    inputs = _rows(x if mask is None else x * mask).to(dtype)
    h = _summed(inputs, len(A)) if sums else F.linear(inputs, A)
    if drop:
        h = h / (1 - drop)
    y, h_M = F.linear(_rows(x), W, bias), _through(h, left, A, middle, index)
    if dtype == y.dtype:
        y.addmm_(h_M, left.t())
    else:
        y.add_(F.linear(h_M, left))
    if c is not None:
        y.addcmul_(y, (c - 1).to(y.dtype))  # as `_rows_times`; an export traces this and takes no out=
        if bias is not None:
            y.add_(((1 - c) * bias).to(y.dtype))
    return y, left, A, h, mask


class FactoredLinear(torch.autograd.Function):
    """The function of `factored_linear`, in two passes over y, forward and backward.

    Kept for backward: the s-wide x Aᵀ, x only where A, W or c learns (bits of what was dropped beside it), y only where
    c learns, and references. B, A, … may be float32 masters: they are cast for every product, and x never is. Where the
    caller has changed y in place, backward makes it again.
    """

    @staticmethod
    def forward(ctx, x, drop, W, bias, c, B, A, middle, index, rows, sums):
        _, _, need_w, _, need_c, need_b, need_a, need_middle, _, need_rows, _ = ctx.needs_input_grad
        y, left, right, h, mask = _forward(x, drop, W, bias, c, B, A, middle, index, rows, sums)
        output, ctx.unchanged, ctx.leading = None, True, x.shape[:-1]
        if need_c and torch.compiler.is_compiling():
            output = y.clone()  # which it leaves out where nothing changes y
        elif need_c:
            output, ctx.unchanged = y.data, Unchanged(y)
        ctx.drop, ctx.dtypes, ctx.sums = drop, (B.dtype, A.dtype), sums
        ctx.save_for_backward(
            x if need_a or need_w or need_c else None, mask, W, bias, c, B if rows is not None else left, right,
            middle, index, rows, h if need_b or need_rows or need_middle or need_c else None, output,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, mask, W, bias, c, B, A, middle, index, rows, h, y = ctx.saved_tensors
        need_x, _, need_w, need_bias, need_c, need_b, need_a, need_middle, _, need_rows, _ = ctx.needs_input_grad
        g, dtype = gy, gy.dtype
        gx = gw = gbias = gc = gb = ga = gmiddle = grows = None
        if need_bias:
            gbias = g.sum(0)
        buffer = torch.empty_like(g) if c is not None else None
        if need_c:
            assert c is not None
            if ctx.unchanged:
                product = y if bias is None else y - bias
                gc = torch.mul(g, product, out=buffer).sum(0).to(c.dtype) / c
            else:
                product = F.linear(_rows(x), W).addmm_(_through(h, B, A, middle, index), _scaled(B, rows, dtype).t())
                gc = torch.mul(g, product, out=buffer).sum(0).to(c.dtype)
        if c is not None:
            g = _rows_times(g, c, out=buffer)
        gk = g @ _scaled(B, rows, dtype)
        if need_b or need_rows:
            gleft = (_through(h, B, A, middle, index).t() @ g).t()  # faster than gᵀ k
            gleft = gleft.to(ctx.dtypes[0], memory_format=torch.contiguous_format)
            gb = (gleft if rows is None else gleft * rows[:, None]) if need_b else None
            grows = (gleft * B).sum(1, dtype=rows.dtype) if need_rows else None
        gh = gk
        if middle is not None and index is None:
            gmiddle = (gk * h).sum(0, dtype=middle.dtype) if need_middle else None
            gh = gk * middle.to(dtype)
        elif middle is not None:
            gmiddle = (gk.t() @ h).flatten()[index].to(middle.dtype) if need_middle else None
            gh = gk @ spread(middle.to(dtype), index, B.shape[1], len(A))
        if ctx.drop:
            gh = gh / (1 - ctx.drop)
        if need_a:
            ga = (gh.t() @ _rows(x if mask is None else x * mask)).to(ctx.dtypes[1])
        if need_w:
            gw = g.t() @ _rows(x)
        if need_x:
            gx = g @ W
            if mask is not None:
                gx.add_((gh @ A.to(dtype)).mul_(_rows(mask)))
            elif ctx.sums:
                _spread_sums(gx, gh)
            else:
                gx.addmm_(gh, A)
            gx = gx.view(*ctx.leading, gx.shape[-1])
        return gx, None, gw, gbias, gc, gb, ga, gmiddle, None, grows, None


def _rows(t: Tensor) -> Tensor:
    """Return t as rows (tokens, width), whatever its leading dimensions."""
    return t.reshape(-1, t.shape[-1])


def _summed(x: Tensor, s: int) -> Tensor:
    """Return x [I I … I]ᵀ (tokens, s): sums over every s-th entry, a pass over x where a product would be several."""
    n = x.shape[1] - x.shape[1] % s
    h = x[:, :n].unflatten(1, (-1, s)).sum(1)
    if n < x.shape[1]:
        h[:, : x.shape[1] - n] += x[:, n:]
    return h


def _spread_sums(x: Tensor, h: Tensor) -> None:
    """Add h [I I … I] to x in place."""
    n = x.shape[1] - x.shape[1] % h.shape[1]
    x[:, :n].unflatten(1, (-1, h.shape[1])).add_(h[:, None])
    if n < x.shape[1]:
        x[:, n:] += h[:, : x.shape[1] - n]


def _rows_times(t: Tensor, c: Tensor, out: Tensor | None) -> Tensor:
    """Return t · c for factors c near 1, of which c − 1 is rounded to t's dtype.

    c itself would lose a small change there, and a product of two dtypes makes wide copies of t.
    """
    return torch.addcmul(t, t, (c - 1).to(t.dtype), out=out)


def _scaled(B: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (B if rows is None else rows[:, None] * B).to(dtype)


def _through(h: Tensor, B: Tensor, A: Tensor, middle: Tensor | None, index: Tensor | None) -> Tensor:
    """Return h Mᵀ."""
    if middle is None:
        return h
    if index is None:
        return h * middle.to(h.dtype)
    return F.linear(h, spread(middle.to(h.dtype), index, B.shape[1], len(A)))


class SparseLinear(torch.autograd.Function):
    """The function of `sparse_linear`, in one product: the K entries are written into a passing copy of W.

    Backward makes the copy again and gathers the gradients of all values out of one dense product, which is dropped at
    once.
    """

    @staticmethod
    def forward(ctx, x, W, bias, *entries):
        _, *entries = entries
        ctx.save_for_backward(x, W, *entries)
        return F.linear(_rows(x), _scattered(W, entries), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, W, *entries = ctx.saved_tensors
        need_x, need_w, need_bias, _, *need = ctx.needs_input_grad
        gx = (gy @ _scattered(W, entries)).view(x.shape) if need_x else None
        gw = gy.t() @ _rows(x) if need_w or any(need) else None
        found: list[Tensor | None] = []
        for index, values, needed in zip(entries[::2], entries[1::2], need[1::2], strict=True):
            found += [None, gw.flatten()[index].to(values.dtype) if needed and gw is not None else None]
        return gx, gw if need_w else None, gy.sum(0) if need_bias else None, None, *found


class BlockLinear(torch.autograd.Function):
    """The function of `block_linear`: x Wᵀ + bias, and K blocks of b × b of ΔW in products of their own size."""

    @staticmethod
    def forward(ctx, x, W, bias, rows, columns, values):
        ctx.save_for_backward(x, W, rows, columns, values)
        y = F.linear(_rows(x), W, bias)
        added = _strips(x, columns, values) @ values.to(x.dtype).transpose(1, 2)
        y.unflatten(1, (-1, values.shape[1])).index_add_(1, rows, added.transpose(0, 1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, W, rows, columns, values = ctx.saved_tensors
        need_x, need_w, need_bias, _, _, need_values = ctx.needs_input_grad
        strips = _strips(gy, rows, values)
        gx = gw = gvalues = None
        if need_x:
            gx = gy @ W
            added = strips @ values.to(gy.dtype)
            gx.unflatten(1, (-1, values.shape[1])).index_add_(1, columns, added.transpose(0, 1))
            gx = gx.view(x.shape)
        if need_w:
            gw = gy.t() @ _rows(x)
        if need_values:
            gvalues = (strips.transpose(1, 2) @ _strips(x, columns, values)).to(values.dtype)
        return gx, gw, gy.sum(0) if need_bias else None, None, None, gvalues


def _strips(t: Tensor, blocks: Tensor, values: Tensor) -> Tensor:
    """Return (K, tokens, b): for each of K blocks the b columns of t (…, width) that it touches."""
    return _rows(t).unflatten(1, (-1, values.shape[1])).index_select(1, blocks).transpose(0, 1)


def _scattered(W: Tensor, entries: Sequence[Tensor]) -> Tensor:
    """Return a copy of W with the values of every change added at its flat positions, laid out as W is.

    They are added in float32 at least, and rounded once. entries: index, values, index, values, …
    """
    W = W.detach()
    turned = not W.is_contiguous() and W.t().is_contiguous()  # as transformers' Conv1D stores it
    stored = W.t() if turned else W
    wide = torch.promote_types(entries[1].dtype, W.dtype)
    kept = wide if len(entries) > 2 else W.dtype  # of several changes the sum is what is rounded
    flat = stored.to(kept, memory_format=torch.contiguous_format, copy=True).flatten()
    for index, values in zip(entries[::2], entries[1::2], strict=True):
        place = index % W.shape[1] * W.shape[0] + index // W.shape[1] if turned else index
        if kept == wide:
            flat.index_add_(0, place, values.to(wide))
        else:
            flat[place] = (flat[place].to(wide) + values).to(kept)
    made = flat.to(W.dtype).view(stored.shape)
    return made.t() if turned else made
