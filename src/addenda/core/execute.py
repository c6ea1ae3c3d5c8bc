"""How an adapted layer computes: one of four paths, chosen by what the live methods offer.

1. exact low rank, scaled rows included: the thin products are accumulated into the base product; backward keeps the
   thin intermediate, and the input only where a factor on its side learns;
2. a method's own `apply` on the activations;
3. sparse: the entries are written into a passing copy of W, and their gradient is gathered; whole blocks instead
   make small products of their own;
4. anything else: y = op(x, W + ΔW), where backward recomputes W + ΔW instead of keeping it.

No path keeps a dense copy of a weight between forward and backward.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from addenda.core.method import Base, Factors, WeightMethod, spread, to_float
from addenda.core.recompute import as_recipe
from addenda.core.sites import CONV1D, LINEAR, PARAMETER, Kind

if TYPE_CHECKING:
    from addenda.core.adapted import SiteTensors


def execute(
    module: nn.Module, original: type, kind: Kind, live: "Sequence[SiteTensors]", x: Tensor, *rest, **options
) -> Tensor:
    """The output of an adapted module: its own product, changed by every live delta."""
    weight = module._parameters["weight"]
    assert weight is not None
    x, weight, bias = _autocast(x, weight, getattr(module, "bias", None))  # the attribute: a trained bias
    plain = original.forward is nn.Linear.forward or kind != LINEAR

    def product(x: Tensor) -> Tensor:
        return kind.product(module, x, weight, bias) if plain else original.forward(module, x, *rest, **options)

    device = x.device.type
    off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with as_recipe(x), off:
        return _run(module, kind, live, x, weight, bias, product, plain)


def _run(module, kind: Kind, live: "Sequence[SiteTensors]", x, weight, bias, product, plain: bool) -> Tensor:
    if kind.dense and len(live) == 1:
        t, m = live[0], live[0].method
        if plain and m.has("factors"):
            return _factored(kind, x, weight, bias, t)
        if m.has("apply"):
            return m.apply(x, Base(product, kind.to_matrix(weight.detach()), bias), t.tensors())
        if plain and m.has("blocks"):
            W = kind.to_matrix(weight)
            return BlockLinear.apply(x, W, bias, *m.blocks(t.tensors(), (W.shape[0], W.shape[1])))
        if plain and kind == LINEAR and m.has("sparse"):
            index, values = m.sparse(t.tensors(), weight.shape)
            return SparseLinear.apply(x, weight, bias, index, values)
    thin = [t for t in live if _thin(t.method)]
    if plain and kind.dense and len(live) == len(thin) and not any(_dropout(t) for t in thin):
        B, A = zip(*(_factors(t, kind, weight).pair() for t in thin), strict=True)
        return factored_linear(x, 0.0, kind.to_matrix(weight), bias, None, Factors(torch.cat(B, 1), torch.cat(A)))
    rest = [t for t in live if not _thin(t.method)]
    if rest and plain:
        y = _recomputed(kind, module, x, weight, bias, rest)
    else:
        y = product(x)
        for t in rest:  # a subclass with a forward of its own: add what the change alone contributes
            change = t.method.delta(weight.detach().float(), to_float(t.tensors())).to(x.dtype)
            y = y + F.linear(x, change)
    for t in thin:
        B, A = _factors(t, kind, weight).pair()
        path = F.dropout(x, p) if (p := _dropout(t)) and x.is_floating_point() else x
        y = y + kind.low_rank(module, path, B.to(y.dtype), A.to(y.dtype))
    return y


def _thin(method: WeightMethod) -> bool:
    """Whether ΔW alone is the product of the factors."""
    return method.has("factors") and not method.has("magnitude")


def _factored(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, t: "SiteTensors") -> Tensor:
    W, p = kind.to_matrix(weight), t.tensors()
    c = t.method.magnitude(W.detach(), p) if t.method.has("magnitude") else None
    return factored_linear(x, _dropout(t), W, bias, c, t.method.factors(p, (W.shape[0], W.shape[1])))


def effective(kind: Kind, weight: Tensor, live: "Sequence[SiteTensors]") -> Tensor:
    """The weight that acts: W + Σ ΔW, computed in float32 at least and rounded once to W's dtype, as stored."""
    with torch.autocast(weight.device.type, enabled=False):
        return _effective(kind, weight, [(t.method, t.tensors(), t.shared) for t in live])


def _effective(kind: Kind, weight: Tensor, parts: "list[tuple]") -> Tensor:
    if kind == PARAMETER and parts[0][0].any_shape and len(parts) == 1:
        return parts[0][0].effective(weight, parts[0][1]).to(weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    W = kind.to_matrix(weight).to(wide)
    stacked = []
    for m, p, shared in parts:
        p = to_float(p, wide)
        each = [p] if W.dim() < 3 else [{k: t if k in shared else t[e] for k, t in p.items()} for e in range(len(W))]
        stacked.append([(m, q, W if W.dim() < 3 else W[e]) for e, q in enumerate(each)])
    if len(stacked) == 1:
        new = [m.effective(w, p) for m, p, w in stacked[0]]
    else:
        new = [each[0][2] + sum(m.delta(w, p) for m, p, w in each) for each in zip(*stacked, strict=True)]
    return kind.from_matrix(new[0] if W.dim() < 3 else torch.stack(new), weight).to(weight.dtype)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do to a product's arguments: the paths below run with it switched off."""
    if not (torch.is_autocast_enabled(x.device.type) and x.is_floating_point()) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _factors(t: "SiteTensors", kind: Kind, weight: Tensor) -> Factors:
    shape = kind.to_matrix(weight).shape
    return t.method.factors(t.tensors(), (shape[0], shape[1]))


def _dropout(t: "SiteTensors") -> float:
    return t.method.dropout if t.training else 0.0


def factored_linear(
    x: Tensor, drop: float, W: Tensor, bias: Tensor | None, c: Tensor | None, factors: Factors
) -> Tensor:
    """y = x (W + ΔW)ᵀ + bias, where the factors' product is ΔW; with c, diag(c) stands before W + ΔW.

    Shapes: x (…, n); W (m, n) or any strided view of it; bias, c (m). drop: the share of x that ΔW does not see.
    """
    if torch.is_grad_enabled():
        return FactoredLinear.apply(x, drop, W, bias, c, *factors)
    return _forward(x, drop, W, bias, c, *factors)[0]


def _forward(x, drop, W, bias, c, B, A, middle, index, rows):
    """The output, and what backward may want: factors in x's dtype, the thin intermediate, the entries of x it saw."""
    seen = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - drop) if drop else None
    A, left = A.to(x.dtype), _scaled(B, rows, x.dtype)
    h = _rows(F.linear(x if seen is None else x * seen, A))
    if drop:
        h = h / (1 - drop)
    y = F.linear(x, W, bias)
    _rows(y).addmm_(_through(h, left, A, middle, index), left.t())
    if c is not None:
        y.mul_(c)
        if bias is not None:
            y.add_((1 - c) * bias)
    return y, left, A, h, seen


class FactoredLinear(torch.autograd.Function):
    """`factored_linear` in two passes over y, forward and backward.

    Kept for backward: the s-wide x Aᵀ, x only where A or W learns (bits of what was dropped beside it), y only where c
    learns, and references. B, A, … may be float32 masters: they are cast for every product, and x never is.
    """

    @staticmethod
    def forward(ctx, x, drop, W, bias, c, B, A, middle, index, rows):
        _, _, need_w, _, need_c, need_b, need_a, need_middle, _, need_rows = ctx.needs_input_grad
        y, left, right, h, seen = _forward(x, drop, W, bias, c, B, A, middle, index, rows)
        ctx.drop, ctx.dtypes = drop, (B.dtype, A.dtype)
        ctx.save_for_backward(
            x if need_a or need_w else None, seen, W, bias, c, B if rows is not None else left, right,
            middle, index, rows,
            h if need_b or need_rows or need_middle else None, y.detach() if need_c else None,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, seen, W, bias, c, B, A, middle, index, rows, h, y = ctx.saved_tensors
        need_x, _, need_w, need_bias, need_c, need_b, need_a, need_middle, _, need_rows = ctx.needs_input_grad
        g, dtype = _rows(gy), gy.dtype
        gx = gw = gbias = gc = gb = ga = gmiddle = grows = None
        if need_bias:
            gbias = g.sum(0)
        if need_c:
            own = _rows(y) if bias is None else _rows(y) - bias
            gc = (g * own).sum(0, dtype=c.dtype) / c
        if c is not None:
            g = torch.mul(g, c, out=torch.empty_like(g))
        gk = g @ _scaled(B, rows, dtype)
        if need_b or need_rows:
            gleft = (_through(h, B, A, middle, index).t() @ g).t()  # faster than gᵀ k by a quarter and more
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
            ga = (gh.t() @ _rows(x if seen is None else x * seen)).to(ctx.dtypes[1])
        if need_w:
            gw = g.t() @ _rows(x)
        if need_x:
            gx = g @ W
            if seen is None:
                gx.addmm_(gh, A)
            else:
                gx.add_((gh @ A).mul_(_rows(seen)))
            gx = gx.view(*gy.shape[:-1], gx.shape[-1])
        return gx, None, gw, gbias, gc, gb, ga, gmiddle, None, grows


def _rows(t: Tensor) -> Tensor:
    """(tokens, width), whatever the leading dimensions."""
    return t.reshape(-1, t.shape[-1])


def _scaled(B: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (B if rows is None else rows[:, None] * B).to(dtype)


def _through(h: Tensor, B: Tensor, A: Tensor, middle: Tensor | None, index: Tensor | None) -> Tensor:
    """h Mᵀ."""
    if middle is None:
        return h
    if index is None:
        return h * middle.to(h.dtype)
    return F.linear(h, spread(middle.to(h.dtype), index, B.shape[1], len(A)))


class SparseLinear(torch.autograd.Function):
    """y = x (W + scatter(values))ᵀ + bias, in one product: the K entries are written into a passing copy of W.

    Shapes: x (…, n); W (m, n); index, values (K), flat positions of W. Backward makes the copy again and gathers the
    gradient of the values out of one dense product, which is dropped at once.
    """

    @staticmethod
    def forward(ctx, x, W, bias, index, values):
        ctx.save_for_backward(x, W, index, values)
        return F.linear(x, _scattered(W, index, values), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, W, index, values = ctx.saved_tensors
        need_x, need_w, need_bias, _, need_values = ctx.needs_input_grad
        flat = gy.reshape(-1, gy.shape[-1])
        gx = (flat @ _scattered(W, index, values)).view(x.shape) if need_x else None
        gw = flat.t() @ x.reshape(-1, x.shape[-1]) if need_w or need_values else None
        gvalues = gw.flatten()[index].to(values.dtype) if need_values and gw is not None else None
        return gx, gw if need_w else None, flat.sum(0) if need_bias else None, None, gvalues


class BlockLinear(torch.autograd.Function):
    """y = x Wᵀ + bias, and what K blocks of b × b of ΔW add to it, in products of their size.

    Shapes: x (…, n); W (m, n); rows, columns (K), values (K, b, b) as in `WeightMethod.blocks`.
    """

    @staticmethod
    def forward(ctx, x, W, bias, rows, columns, values):
        ctx.save_for_backward(x, W, rows, columns, values)
        y = F.linear(x, W, bias)
        added = _strips(x, columns, values) @ values.to(x.dtype).transpose(1, 2)
        _rows(y).unflatten(1, (-1, values.shape[1])).index_add_(1, rows, added.transpose(0, 1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, W, rows, columns, values = ctx.saved_tensors
        need_x, need_w, need_bias, _, _, need_values = ctx.needs_input_grad
        g, strips = _rows(gy), _strips(gy, rows, values)
        gx = gw = gvalues = None
        if need_x:
            gx = g @ W
            added = strips @ values.to(gy.dtype)
            gx.unflatten(1, (-1, values.shape[1])).index_add_(1, columns, added.transpose(0, 1))
            gx = gx.view(x.shape)
        if need_w:
            gw = g.t() @ _rows(x)
        if need_values:
            gvalues = (strips.transpose(1, 2) @ _strips(x, columns, values)).to(values.dtype)
        return gx, gw, g.sum(0) if need_bias else None, None, None, gvalues


def _strips(t: Tensor, which: Tensor, values: Tensor) -> Tensor:
    """(K, tokens, b): for each of K blocks the b columns of t (…, width) that it touches."""
    return _rows(t).unflatten(1, (-1, values.shape[1])).index_select(1, which).transpose(0, 1)


def _scattered(W: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of W with W + values at the flat positions, added in float32 at least and rounded once."""
    flat = W.detach().flatten().clone() if W.is_contiguous() else W.detach().flatten()
    flat[index] = (flat[index].to(torch.promote_types(values.dtype, W.dtype)) + values).to(W.dtype)
    return flat.view(W.shape)


def _recomputed(
    kind: Kind, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, parts: "list[SiteTensors]"
) -> Tensor:
    """op(x, W + Σ ΔW) whose backward computes the effective weight again."""
    named = [(t.method, t.tensors(), t.shared) for t in parts]
    flat = [tensor for _, p, _ in named for tensor in p.values()]

    def build(weight: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        it = iter(tensors)
        return _effective(kind, weight, [(m, {k: next(it) for k in p}, shared) for m, p, shared in named])

    if torch.compiler.is_compiling():  # cannot trace autograd.grad in a backward, and decides itself what to recompute
        return kind.product(module, x, build(weight, flat), bias)
    return _Recompute.apply(build, kind, module, x, weight, bias, *flat)


class _Recompute(torch.autograd.Function):
    """y = product(x, build(W, tensors)): saves x and references only, builds the weight once more in backward."""

    @staticmethod
    def forward(ctx, build: Callable, kind: Kind, module, x, weight, bias, *tensors):
        ctx.build, ctx.kind, ctx.module = build, kind, module
        ctx.save_for_backward(x, weight, bias, *tensors)
        return kind.product(module, x, build(weight, tensors), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight, bias, *tensors = ctx.saved_tensors
        _, _, _, need_x, need_w, need_bias, *need = ctx.needs_input_grad
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, need, strict=True)]
        w = weight.detach().requires_grad_(need_w)
        with torch.enable_grad(), torch.autocast(gy.device.type, enabled=False):
            built = ctx.build(w, leaves)
            wanted = [t for t in (w, *leaves) if t.requires_grad]
            if ctx.kind == LINEAR or ctx.kind == CONV1D:
                flat, gbias = gy.reshape(-1, gy.shape[-1]), None
                left = flat.t() if ctx.kind == LINEAR else x.reshape(-1, x.shape[-1]).t()
                right = x.reshape(-1, x.shape[-1]) if ctx.kind == LINEAR else flat
                gbuilt = left @ right if wanted else None
                with torch.no_grad():
                    gx = (flat @ (built if ctx.kind == LINEAR else built.t())).view(x.shape) if need_x else None
                    gbias = flat.sum(0) if need_bias else None
            else:
                xd = x.detach().requires_grad_(need_x)
                wd = built.detach().requires_grad_()
                bd = None if bias is None else bias.detach().requires_grad_(need_bias)
                y = ctx.kind.product(ctx.module, xd, wd, bd)
                inputs = [t for t, n in ((wd, True), (xd, need_x), (bd, need_bias)) if n and t is not None]
                grads = iter(torch.autograd.grad(y, inputs, gy))
                gbuilt, gx, gbias = (
                    next(grads),
                    next(grads) if need_x else None,
                    next(grads) if need_bias else None,
                )
            found = iter(torch.autograd.grad(built, wanted, gbuilt, allow_unused=True) if wanted else ())
        gw = next(found) if need_w else None
        return None, None, None, gx, gw, gbias, *[next(found) if n else None for n in need]
