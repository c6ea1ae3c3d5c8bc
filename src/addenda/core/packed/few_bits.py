"""Matrices read in few bits: each number becomes one of 2^b codes of its matrix (Jie et al. 2023, arXiv 2307.16867).

    z = (W − mean) / (std + 1e-5)        mean, std: of all numbers of the matrix, std with n − 1
    Ŵ = std · Q(z) + mean                Q: the nearest of 2^b codes v_k

The codes are those of a standard normal z with the least mean |z − Q(z)|: each is the median of the numbers that are
nearer to it than to its neighbours, Φ(v_k) = (Φ(t_k) + Φ(t_{k+1})) / 2, with thresholds t_k half-way between codes.
They depend on b alone. Newton's method from quantiles solves these equations to rounding for every b; iterating them
from zero, as the released code does, has not converged for 8 bits.

Training keeps W and moves it by the gradient of Ŵ where ∂Q/∂z is taken as 1. With G = ∂loss/∂Ŵ, a = std / (std + 1e-5)
and n numbers

    ste="paper"    ∂loss/∂W = a G + (1 − a) ΣG / n + Σ G (Q(z) − a z) · (W − mean) / ((n − 1) std)
    ste="plain"    ∂loss/∂W = G, as if mean and std were constants and a = 1

Shipped are codes, ⌈n b / 8⌉ bytes, the first number in the lowest bits of the first byte, and two float32 numbers, mean
and std: a `FewBits`. Quantised values have another mean and std than W, so quantising twice is not quantising once.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from addenda.core.packed.bits import pack, unpack
from addenda.core.packed.tensor import Packed

MOST = 8
EPS = 1e-5


@cache
def codebook(bits: int) -> tuple[float, ...]:
    """Return the 2^bits codes in rising order, accurate to 1e-12; symmetric around 0."""
    half = 2 ** (bits - 1)
    zero = torch.zeros(1, dtype=torch.float64)
    v = torch.special.ndtri((torch.arange(half, dtype=torch.float64) + half + 0.5) / (2 * half))
    for _ in range(12):  # quadratic from here: 9 steps for 8 bits
        t = torch.cat([zero, (v[1:] + v[:-1]) / 2])
        above = torch.cat([_above(t), zero])  # the mass above each threshold; 0 above all
        slope = torch.cat([zero, _density(t[1:]) / 4, zero])  # of half that mass, by either code beside the threshold
        J = torch.diag(slope[:-1] + slope[1:] - _density(v))
        J += torch.diag(slope[1:-1], 1) + torch.diag(slope[1:-1], -1)
        v = v - torch.linalg.solve(J, _above(v) - (above[1:] + above[:-1]) / 2)
    upper = v.tolist()
    return (*(-x for x in reversed(upper)), *upper)


def _above(t: Tensor) -> Tensor:
    return torch.special.ndtr(-t)


def _density(t: Tensor) -> Tensor:
    return torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)


_tables: dict[tuple, tuple[Tensor, Tensor]] = {}


def table(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (codes: 2^bits, thresholds: 2^bits − 1) as tensors, which are made once."""
    key = (bits, dtype, device)
    if key not in _tables:
        with torch.inference_mode(False):
            codes = torch.tensor(codebook(bits), dtype=torch.float64)
            tables = codes, (codes[1:] + codes[:-1]) / 2
            _tables[key] = tables[0].to(device, dtype), tables[1].to(device, dtype)
    return _tables[key]


def quantised(W: Tensor, bits: int, ste: str = "paper", stacked: bool = False) -> Tensor:
    """Return W rounded to its codes, Ŵ, in W's shape and dtype. stacked: each matrix has a mean and std of its own."""
    return _Quantised.apply(W, bits, ste == "paper", len(W) if stacked else 1)


def encoded(W: Tensor, bits: int, stacked: bool = False) -> "FewBits":
    """Return W (any floating dtype) as codes, mean and std, to be shipped; its values are those of `quantised`."""
    flat = W.detach().reshape(len(W) if stacked else 1, -1)
    codes, mean, std = _codes(flat.to(torch.promote_types(W.dtype, torch.float32)), bits)
    tensors = pack(codes, bits), torch.cat([mean, std], 1).float()
    tensors = tensors if stacked else tuple(t[0] for t in tensors)
    return FewBits.of(*tensors, bits, W.shape, torch.promote_types(W.dtype, torch.float32))


def _codes(flat: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes: int32, mean: k × 1, std: k × 1) of k matrices in rows."""
    mean = flat.mean(1, keepdim=True)
    std = flat.std(1, keepdim=True) if flat.shape[1] > 1 else torch.zeros_like(mean)
    z = (flat - mean) / (std + EPS)
    return torch.bucketize(z, table(bits, flat.dtype, flat.device)[1], out_int32=True), mean, std


def _chosen(codes: Tensor, bits: int, like: Tensor) -> Tensor:
    """Return the value v of each code, in the dtype of `like`."""
    return table(bits, like.dtype, like.device)[0].index_select(0, codes.flatten()).view(codes.shape)


class _Quantised(torch.autograd.Function):
    """The rounding of W to Ŵ with its gradient. Keeps W, which is there anyway, and the codes: a byte a number."""

    @staticmethod
    def forward(ctx, W, bits, paper, count):
        flat = W.reshape(count, -1).to(torch.promote_types(W.dtype, torch.float32))
        codes, mean, std = _codes(flat, bits)
        ctx.bits, ctx.paper = bits, paper
        ctx.save_for_backward(*((W, codes.to(torch.uint8), mean, std) if paper else ()))
        return (_chosen(codes, bits, flat) * std + mean).view(W.shape).to(W.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        if not ctx.paper:
            return G, None, None, None
        W, codes, mean, std = ctx.saved_tensors
        g = G.reshape(codes.shape).to(mean.dtype)
        centred = W.reshape(codes.shape).to(mean.dtype) - mean
        a, n = std / (std + EPS), codes.shape[1]
        off = _chosen(codes.int(), ctx.bits, mean) - a * centred / (std + EPS)
        along = (g * off).sum(1, keepdim=True) / max(n - 1, 1)
        grad = a * g + (1 - a) * g.mean(1, keepdim=True) + along * (centred / std.clamp_min(1e-30))
        return grad.view(W.shape).to(W.dtype), None, None, None


# -- packed ------------------------------------------------------------------------------------------------------------


class FewBits(Packed):
    """A matrix, or a stack, in few bits: codes in bytes; moments, mean and std of each matrix; book, the 2^b codes."""

    parts = ("codes", "moments", "book")
    codes: Tensor
    moments: Tensor
    book: Tensor

    @classmethod
    def of(cls, codes: Tensor, moments: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> "FewBits":
        """Build from a file's codes, uint8 (⌈n b / 8⌉) or (k, ⌈n b / 8⌉), and moments, float32 (2) or (k, 2)."""
        book = table(bits, torch.float32, codes.device)[0].clone()
        return cls({"codes": codes, "moments": moments, "book": book}, torch.Size(shape), dtype)

    @property
    def depth(self) -> int:
        """The number b of bits of a code."""
        return self.book.numel().bit_length() - 1

    def unpack(self) -> Tensor:
        codes, moments = self.codes.view(-1, self.codes.shape[-1]), self.moments.view(-1, 2)
        n = self.numel() // len(codes)
        return (self.book[unpack(codes, self.depth, n).long()] * moments[:, 1:] + moments[:, :1]).view(self.shape)
