"""How an adapted layer computes: one of four paths, chosen by what the live methods offer.

1. exact low rank: the rank-r products are accumulated into the base product; backward keeps the input and the
   r-wide intermediate, and casts the factors, never the input;
2. a method's own `apply` on the activations;
3. sparse: the entries are written into a passing copy of W, and their gradient is gathered;
4. anything else: y = op(x, W + ΔW), where backward recomputes W + ΔW instead of keeping it.

No path keeps a dense copy of a weight between forward and backward.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from addenda.core.method import Base, to_float
from addenda.core.recompute import as_recipe
from addenda.core.sites import CONV1D, LINEAR, PARAMETER, Kind

if TYPE_CHECKING:
    from addenda.core.adapted import SiteTensors


def execute(
    module: nn.Module, original: type, kind: Kind, live: "Sequence[SiteTensors]", x: Tensor, *rest, **options
) -> Tensor:
    """The output of an adapted module: its own product, changed by every live delta."""
    with as_recipe(x):
        return _execute(module, original, kind, live, x, *rest, **options)


def _execute(
    module: nn.Module, original: type, kind: Kind, live: "Sequence[SiteTensors]", x: Tensor, *rest, **options
) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    x, weight, bias = _autocast(x, weight, getattr(module, "bias", None))  # the attribute: a trained bias
    plain = original.forward is nn.Linear.forward or kind != LINEAR

    def product(x: Tensor) -> Tensor:
        return kind.product(module, x, weight, bias) if plain else original.forward(module, x, *rest, **options)

    with torch.autocast(x.device.type, enabled=False):
        if kind.dense and len(live) == 1 and live[0].method.has("apply"):
            return live[0].method.apply(x, Base(product, kind.to_matrix(weight.detach()), bias), live[0].tensors())
        thin = [t for t in live if t.method.has("factors")]
        rest_ = [t for t in live if not t.method.has("factors")]
        if len(thin) == 1 and not rest_ and plain and kind.dense:
            B, A = _factors(thin[0], kind, weight)
            w = weight if kind == LINEAR else weight.t()
            return LowRankLinear.apply(x, _dropped(x, thin[0]), w, bias, B, A)
        if len(live) == 1 and kind == LINEAR and plain and live[0].method.has("sparse"):
            index, values = live[0].method.sparse(live[0].tensors(), kind.to_matrix(weight).shape)
            return SparseLinear.apply(x, weight, bias, index, values)
        if rest_ and plain:
            y = _recomputed(kind, module, x, weight, bias, rest_)
        else:
            y = product(x)
            for t in rest_:  # a subclass with a forward of its own: add what the change alone contributes
                change = t.method.delta(weight.detach().float(), to_float(t.tensors())).to(x.dtype)
                y = y + F.linear(x, change)
        for t in thin:
            B, A = _factors(t, kind, weight)
            dropped = _dropped(x, t)
            y = y + kind.low_rank(module, x if dropped is None else dropped, B.to(y.dtype), A.to(y.dtype))
        return y


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


def _factors(t: "SiteTensors", kind: Kind, weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = kind.to_matrix(weight).shape
    return t.method.factors(t.tensors(), (shape[0], shape[1]))


def _dropped(x: Tensor, t: "SiteTensors") -> Tensor | None:
    """The input of the additive path under dropout, or None when it is x itself."""
    return F.dropout(x, t.method.dropout) if t.training and t.method.dropout > 0 and x.is_floating_point() else None


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + (x' Aᵀ) Bᵀ, with x' = x unless dropout made another.

    Shapes: x (…, n); W (m, n) or any strided view of it; B (m, r); A (r, n). Saved for backward: x, the r-wide
    intermediate, and references to W, B and A. B and A may be float32 masters: they are cast, x never is.
    """

    @staticmethod
    def forward(ctx, x, dropped, W, bias, B, A):
        y = F.linear(x, W, bias)
        path = x if dropped is None else dropped
        h = F.linear(path, A.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), B.to(x.dtype).t())
        ctx.save_for_backward(x, dropped, W, h, B, A)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, dropped, W, h, B, A = ctx.saved_tensors
        need_x, need_dropped, need_w, need_bias, need_b, need_a = ctx.needs_input_grad
        flat = gy.reshape(-1, gy.shape[-1])
        path = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
        gh = flat @ B.to(gy.dtype)
        gx = gd = gw = gbias = None
        if need_x:
            gx = flat @ W
            if dropped is None:
                gx.addmm_(gh, A.to(gy.dtype))
            gx = gx.view(x.shape)
        if need_dropped:
            gd = (gh @ A.to(gy.dtype)).view(x.shape)
        if need_w:
            gw = flat.t() @ x.reshape(-1, x.shape[-1])
        if need_bias:
            gbias = flat.sum(0)
        gb = (flat.t() @ h.view(-1, h.shape[-1])).to(B.dtype) if need_b else None
        ga = (gh.t() @ path).to(A.dtype) if need_a else None
        return gx, gd, gw, gbias, gb, ga


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
