"""How an adapted layer computes: one of four paths, chosen by what the live methods offer.

1. exact low rank, scaled rows included: the thin products are accumulated into the base product; backward keeps the
   thin intermediate, and the input only where a factor on its side learns;
2. a method's own `apply` on the activations;
3. sparse: the entries, of several changes too, are written into a passing copy of W, and their gradient is gathered;
   whole blocks instead make small products of their own, and of an embedding only the rows looked up are changed;
4. anything else: y = op(x, W + ΔW), where backward recomputes W + ΔW instead of keeping it.

No path keeps a dense copy of a weight between forward and backward.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from addenda.core.base.errors import AddendaError
from addenda.core.forward.fused import block_linear, factored_linear, sparse_linear
from addenda.core.forward.tensors import SiteTensors, each_of
from addenda.core.method.contract import Base, Factors, Params, WeightMethod, to_float
from addenda.core.modules.autocast import autocast_dtype, switched_off, without_autocast
from addenda.core.modules.recompute import as_recipe
from addenda.core.modules.returned import returned
from addenda.core.modules.rows import changed_rows
from addenda.core.site.kinds import CONV1D, EMBEDDING, LINEAR, PARAMETER, Kind


def execute(
    module: nn.Module, original: type, kind: Kind, live: Sequence[SiteTensors], x: Tensor, *rest, **options
) -> Tensor:
    """Return an adapted module's output: its own product, changed by every live delta."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise AddendaError(
            f"The weight of this {original.__name__} is no parameter of it any more: a parametrization, weight norm or "
            "pruning made after attach computes it, or this is a replica of DataParallel, which copies no adapters. "
            "Make them before attach; of several devices use DistributedDataParallel."
        )
    for t in live:
        t.refuse_absent(x)
    device, bias = x.device.type, getattr(module, "bias", None)  # the attribute: a trained bias
    autocast = autocast_dtype(device)
    if autocast is not None and x.is_floating_point() and x.dtype != torch.float64:  # what it would do to arguments
        x, weight = x.to(autocast), weight.to(autocast)
        bias = None if bias is None else bias.to(autocast)
    plain = original.forward is nn.Linear.forward or kind != LINEAR

    def product(x: Tensor) -> Tensor:
        return kind.product(module, x, weight, bias) if plain else original.forward(module, x, *rest, **options)

    with as_recipe(x), switched_off(device, autocast):
        return _run(module, kind, live, x, weight, bias, product, plain)


def _run(module, kind: Kind, live: Sequence[SiteTensors], x, weight, bias, product, plain: bool) -> Tensor:
    if kind.dense and len(live) == 1:
        t, m = live[0], live[0].method
        if plain and m.has("factors"):
            return _factored(kind, x, weight, bias, t)
        if m.has("apply"):
            return m.apply(x, Base(product, kind.to_matrix(weight.detach()), bias), t.tensors())
        if plain and m.has("blocks"):
            W = kind.to_matrix(weight)
            return block_linear(x, W, bias, *m.blocks(t.tensors(), (W.shape[0], W.shape[1])))
    if plain and all(t.method.has("sparse") for t in live):
        W = kind.to_matrix(weight)
        entries = [t.method.sparse(t.tensors(), (W.shape[0], W.shape[1:].numel())) for t in live]
        if kind.dense:
            return sparse_linear(x, W, bias, entries)
        if kind == EMBEDDING and not module.scale_grad_by_freq:
            return changed_rows(product(x), x, entries, module.padding_idx)
    counted = kind == EMBEDDING and module.scale_grad_by_freq  # gradients of rows, which two products know nothing of
    low = [t for t in live if thin(t.method) and not counted]
    if plain and kind.dense and len(live) == len(low) and not any(_dropout(t) for t in low):
        B, A = zip(*(_factors(t, kind, weight).pair() for t in low), strict=True)
        return factored_linear(x, 0.0, kind.to_matrix(weight), bias, None, Factors(torch.cat(B, 1), torch.cat(A)))
    dense = [t for t in live if t not in low]
    if dense and plain:
        y = _recomputed(kind, module, x, weight, bias, dense)
    else:
        y = product(x)
        for t in dense:  # a subclass with a forward of its own: add what the change alone contributes
            change = t.method.delta(weight.detach().float(), to_float(t.tensors())).to(x.dtype)
            y = y + F.linear(x, change)
    for t in low:
        B, A = _factors(t, kind, weight).pair()
        path = F.dropout(x, p) if (p := _dropout(t)) and x.is_floating_point() else x
        y = y + kind.low_rank(module, path, B.to(y.dtype), A.to(y.dtype))
    return y


def thin(method: WeightMethod) -> bool:
    """Return whether ΔW alone is the product of the factors."""
    return method.has("factors") and not method.has("magnitude")


def _factored(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, t: SiteTensors) -> Tensor:
    W, p = kind.to_matrix(weight), t.tensors()
    c = t.method.magnitude(W.detach(), p) if t.method.has("magnitude") else None
    return factored_linear(x, _dropout(t), W, bias, c, t.method.factors(p, (W.shape[0], W.shape[1])))


def effective(kind: Kind, weight: Tensor, live: Sequence[SiteTensors]) -> Tensor:
    """Return W + Σ ΔW, computed in float32 at least and rounded once to W's dtype, as stored."""
    with without_autocast(weight.device.type):
        return _effective(kind, weight, [(t.method, t.tensors(), t.shared) for t in live])


def _effective(kind: Kind, weight: Tensor, parts: list[tuple[WeightMethod, Params, Sequence[str]]]) -> Tensor:
    if kind == PARAMETER and parts[0][0].any_shape and len(parts) == 1:
        return parts[0][0].effective(weight, parts[0][1]).to(weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    W = kind.to_matrix(weight).to(wide)
    parts = [(m, to_float(p, wide), shared) for m, p, shared in parts]
    if len(parts) == 1:
        made = _of_each(parts[0][0].effective, *parts[0], W)
    else:
        entries = [m.has("sparse") and (W.dim() < 3 or m.any_shape) for m, _, _ in parts]
        dense = [_of_each(part[0].delta, *part, W) for part, few in zip(parts, entries, strict=True) if not few]
        made = W + sum(dense) if dense else W
        for (m, p, _), few in zip(parts, entries, strict=True):
            if few:  # written where they are: no dense form of them
                index, values = m.sparse(p, (W.shape[0], W[0].numel()) if W.dim() else (1, 1))
                made = made.flatten().index_put((index,), values, accumulate=True).view(W.shape)
    return kind.from_matrix(made, weight).to(weight.dtype)


def _of_each(what: Callable, m: WeightMethod, p: Params, shared: Sequence[str], W: Tensor) -> Tensor:
    """Return what(W, p); of a stack, for each matrix with the tensors of its own, unless the method sees it whole."""
    if W.dim() < 3 or m.any_shape:
        return what(W, p)
    return torch.stack([what(w, q) for w, q in zip(W, each_of(p, shared, len(W)), strict=True)])


def _factors(t: SiteTensors, kind: Kind, weight: Tensor) -> Factors:
    shape = kind.to_matrix(weight).shape
    return t.method.factors(t.tensors(), (shape[0], shape[1]))


def _dropout(t: SiteTensors) -> float:
    return t.method.dropout if t.training else 0.0


def _recomputed(
    kind: Kind, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[SiteTensors]
) -> Tensor:
    """Return op(x, W + Σ ΔW), whose backward computes the effective weight again."""
    named = [(t.method, t.tensors(), t.shared) for t in parts]
    flat = [tensor for _, p, _ in named for tensor in p.values()]

    def build(weight: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        it = iter(tensors)
        return _effective(kind, weight, [(m, {k: next(it) for k in p}, shared) for m, p, shared in named])

    if torch.compiler.is_compiling():  # cannot trace autograd.grad in a backward, and decides itself what to recompute
        return kind.product(module, x, build(weight, flat), bias)
    return _Recompute.apply(build, kind, module, x, weight, bias, *flat)


class _Recompute(torch.autograd.Function):
    """The function y = product(x, build(W, tensors)), which saves x and references and builds again in backward."""

    @staticmethod
    def forward(ctx, build: Callable, kind: Kind, module, x, weight, bias, *tensors):
        ctx.build, ctx.kind, ctx.module = build, kind, module
        ctx.save_for_backward(x, weight, bias, *tensors)
        return returned(kind.product(module, x, build(weight, tensors), bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight, bias, *tensors = ctx.saved_tensors
        _, _, _, need_x, need_w, need_bias, *need = ctx.needs_input_grad
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, need, strict=True)]
        w = weight.detach().requires_grad_(need_w)
        with torch.enable_grad(), without_autocast(gy.device.type):
            built = ctx.build(w, leaves)
            trained = [t for t in (w, *leaves) if t.requires_grad]
            if ctx.kind == LINEAR or ctx.kind == CONV1D:
                flat, gbias = gy.reshape(-1, gy.shape[-1]), None
                left = flat.t() if ctx.kind == LINEAR else x.reshape(-1, x.shape[-1]).t()
                right = x.reshape(-1, x.shape[-1]) if ctx.kind == LINEAR else flat
                gbuilt = left @ right if trained else None
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
            gradients = iter(torch.autograd.grad(built, trained, gbuilt, allow_unused=True) if trained else ())
        gw = next(gradients) if need_w else None
        return None, None, None, gx, gw, gbias, *[next(gradients) if n else None for n in need]
