"""How a layer's weight is seen as a matrix, and the two thin layers that a factorisation of it makes.

A convolution of n filters over c channels and kh × kw places, in g groups, is a stack of matrices M; a truncated
singular value decomposition M = B A (rank r) is exactly two convolutions:

| scheme      | stack of              | first                             | second                     |
| ----------- | --------------------- | --------------------------------- | -------------------------- |
| `channel`   | g × (n/g × c/g·kh·kw) | c → g·r, kh × kw, as the original | g·r → n, 1 × 1             |
| `spatial`   | g × (c/g·kh × n/g·kw) | c → g·r, kh × 1, the vertical     | g·r → n, 1 × kw, the other |
| `decoupled` | n × (c/g × kh·kw)     | c → n·r, 1 × 1                    | n·r → n, kh × kw, n groups |

`channel`: Zhang et al., arXiv:1505.06798. `spatial`: Jaderberg et al., arXiv:1405.3866. `decoupled`: network
decoupling, Guo et al., arXiv:1808.05517.

Stride, padding, dilation, padding mode and groups go to the half that they belong to, and the bias to
the second, so that at full rank the two are the original, strided ones included. All matrices of a stack are cut to one
rank, so that the spectrum of a layer is s_j = √Σ over its stack of s_j². A linear layer is its own matrix (`matrix`).

A rank costs, with H × W places going in and H' × W' coming out of the layer,

| scheme      | parameters        | multiplications                     | full rank                 |
| ----------- | ----------------- | ----------------------------------- | ------------------------- |
| `channel`   | c kh kw + n       | (c kh kw + n) H' W'                 | min(n, c kh kw) / g       |
| `spatial`   | c kh + n kw       | c kh H' W + n kw H' W'              | min(c kh, n kw) / g       |
| `decoupled` | n (c/g + kh kw)   | n c/g H W + n kh kw H' W'           | min(c/g, kh kw)           |

A stride therefore makes `channel` no dearer, but what `spatial` and `decoupled` do before it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.compressing.layers import LowRankLinear
from addenda.compressing.macs import Call
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.linalg import by_gram
from addenda.core.site.site import Site


class LowRankConv2d(nn.Module):
    """Two convolutions in the place of one: first (without bias), then second."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, scheme: str):
        super().__init__()
        self.first, self.second, self.scheme = first, second, scheme

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    @property
    def rank(self) -> int:
        return self.second.weight.shape[1]

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight (n × c/g × kh × kw), multiplied out at every look."""
        scheme = SCHEMES[self.scheme]
        kernel = [max(a, b) for a, b in zip(self.first.kernel_size, self.second.kernel_size, strict=True)]
        shape = (self.second.out_channels, self.first.in_channels // self.first.groups, *kernel)
        return scheme.unfold(scheme.product(self), shape, self.first.groups)

    def extra_repr(self) -> str:
        return f"{self.scheme}, rank {self.rank}"


class Scheme(ABC):
    """One way to see a weight (n × c/g × kh × kw) as a stack of matrices (b × m × n)."""

    name: str

    @abstractmethod
    def fold(self, weight: Tensor, groups: int) -> Tensor:
        """Return a weight as its stack of matrices."""

    @abstractmethod
    def unfold(self, matrices: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        """Return the inverse of `fold`."""

    @abstractmethod
    def factored(self, conv: nn.Conv2d, B: Tensor, A: Tensor) -> LowRankConv2d:
        """Return the two convolutions of B (b × m × r) and A (b × r × n)."""

    @abstractmethod
    def product(self, made: LowRankConv2d) -> Tensor:
        """Return B A, out of the two convolutions."""

    @abstractmethod
    def per_rank(self, conv: nn.Conv2d, call: Call | None) -> float:
        """Return what one rank costs: multiplications of one call for an example, or parameters without a call."""


class Channel(Scheme):
    """All of a filter's places together: kh × kw with r filters, then 1 × 1."""

    name = "channel"

    def fold(self, weight, groups):
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def unfold(self, matrices, shape, groups):
        return matrices.reshape(shape)

    def factored(self, conv, B, A):
        g, m, r = B.shape
        first = _conv(conv, A.reshape(g * r, *conv.weight.shape[1:]), conv.groups, (True, True))
        second = _conv(conv, B.reshape(g * m, r, 1, 1), conv.groups, (False, False), True)
        return LowRankConv2d(first, second, self.name)

    def product(self, made):
        g, r = made.first.groups, made.rank
        return made.second.weight.reshape(g, -1, r) @ made.first.weight.reshape(g, r, -1)

    def per_rank(self, conv, call):
        size = conv.weight[0].numel() * conv.groups + conv.out_channels
        return size * (call.written if call else 1)


class Spatial(Scheme):
    """Rows apart from columns: kh × 1, then 1 × kw."""

    name = "spatial"

    def fold(self, weight, groups):
        n, c, kh, kw = weight.shape
        split = weight.reshape(groups, n // groups, c, kh, kw).permute(0, 2, 3, 1, 4)
        return split.reshape(groups, c * kh, n // groups * kw)

    def unfold(self, matrices, shape, groups):
        n, c, kh, kw = shape
        return matrices.reshape(groups, c, kh, n // groups, kw).permute(0, 3, 1, 2, 4).reshape(shape)

    def factored(self, conv, B, A):
        g, r = A.shape[:2]
        n, c, kh, kw = conv.weight.shape
        vertical = B.reshape(g, c, kh, r).permute(0, 3, 1, 2).reshape(g * r, c, kh, 1)
        horizontal = A.reshape(g, r, n // g, kw).permute(0, 2, 1, 3).reshape(n, r, 1, kw)
        first = _conv(conv, vertical, conv.groups, (True, False))
        return LowRankConv2d(first, _conv(conv, horizontal, conv.groups, (False, True), True), self.name)

    def product(self, made):
        g, r, first, second = made.first.groups, made.rank, made.first.weight, made.second.weight
        B = first.reshape(g, r, -1).mT
        return B @ second.reshape(g, len(second) // g, r, -1).transpose(1, 2).reshape(g, r, -1)

    def per_rank(self, conv, call):
        (kh, kw), c, n = conv.kernel_size, conv.in_channels, conv.out_channels
        if call is None:
            return c * kh + n * kw
        return c * kh * call.outside[0] * call.inside[1] * call.times + n * kw * call.written


class Decoupled(Scheme):
    """Channels apart from places, for each filter: 1 × 1, then kh × kw in n groups."""

    name = "decoupled"

    def fold(self, weight, groups):
        return weight.flatten(2)

    def unfold(self, matrices, shape, groups):
        return matrices.reshape(shape)

    def factored(self, conv, B, A):
        n, c, r = B.shape
        first = _conv(conv, B.mT.reshape(n * r, c, 1, 1), conv.groups, (False, False))
        second = _conv(conv, A.reshape(n, r, *conv.kernel_size), n, (True, True), True)
        return LowRankConv2d(first, second, self.name)

    def product(self, made):
        n, r = made.second.out_channels, made.rank
        return made.first.weight.reshape(n, r, -1).mT @ made.second.weight.flatten(2)

    def per_rank(self, conv, call):
        pointwise, spread = conv.out_channels * conv.weight.shape[1], conv.out_channels * conv.weight[0, 0].numel()
        return pointwise * call.read + spread * call.written if call else pointwise + spread


SCHEMES: dict[str, Scheme] = {s.name: s for s in (Channel(), Spatial(), Decoupled())}
MATRIX = "matrix"


def scheme_called(name: str) -> Scheme:
    """Return the scheme of this name. Raises AddendaError for another."""
    if name not in SCHEMES:
        raise AddendaError(f"There is no scheme {name!r}.{nearest(name, SCHEMES)} Known: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


@dataclass(frozen=True)
class Place:
    """A layer to factorise: a convolution under a scheme, or a linear layer, whose scheme is None."""

    site: Site
    scheme: Scheme | None

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def called(self) -> str:
        return MATRIX if self.scheme is None else self.scheme.name

    @property
    def module(self) -> Any:
        return self.site.module

    @property
    def stack(self) -> tuple[int, int, int]:
        """The shape of the stack: (matrices, rows, columns)."""
        b, m, n = self.matrices().shape
        return b, m, n

    def matrices(self) -> Tensor:
        """Return the weight as it stands, (b × m × n)."""
        weight = self.site.weight.detach()
        return self.site.matrix[None] if self.scheme is None else self.scheme.fold(weight, self.module.groups)

    def stored(self, matrices: Tensor) -> Tensor:
        """Return matrices like `matrices()` in the shape and dtype of the weight."""
        weight = self.site.weight
        if self.scheme is None:
            return self.site.kind.from_matrix(matrices[0], weight).to(weight.dtype)
        return self.scheme.unfold(matrices, tuple(weight.shape), self.module.groups).to(weight.dtype)

    def per_rank(self, calls: Sequence[Call] | None = None) -> int:
        """Return what a rank costs: multiplications of one example in these calls, or parameters without calls."""

        def of(call: Call | None) -> float:
            if self.scheme is None:
                return sum(self.stack[1:]) * (call.written if call else 1)
            return self.scheme.per_rank(self.module, call)

        return round(of(None) if calls is None else sum(of(call) for call in calls))

    def dense(self, calls: Sequence[Call] | None = None) -> int:
        """Return what the layer costs as it is, counted alike."""
        return round(self.site.weight.numel() * (1 if calls is None else sum(c.written for c in calls)))

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (b × m × k), S (b × k), Vᵀ (b × k × n) in float64. Raises AddendaError where it fails."""
        M = self.matrices().double()
        if not bool(torch.isfinite(M).all()):
            count = int((~torch.isfinite(M)).sum())
            raise AddendaError(
                f"{self.path} has {count:,} weights of {M.numel():,} that are not finite, so it has no singular "
                "values. Training diverged or the file is damaged: go back to an earlier checkpoint, or lower the "
                "rate."
            )
        try:
            return _from_gram(M) or torch.linalg.svd(M, full_matrices=False)
        except RuntimeError as error:  # LinAlgError is one
            raise AddendaError(f"The singular value decomposition of {self.path} failed: {error}") from error

    def factored(self, U: Tensor, S: Tensor, Vt: Tensor, rank: int) -> nn.Module:
        """Return the two thin layers of the leading triplets, each with √S, in this layer's dtype, device and flags."""
        root = S[:, :rank].sqrt()
        B, A = U[:, :, :rank] * root[:, None], root[..., None] * Vt[:, :rank]
        weight, bias = self.site.weight, self.module.bias
        if self.scheme is None:
            layer: nn.Module = LowRankLinear.of(B[0], A[0], bias, weight.dtype, weight.device)
        else:
            layer = self.scheme.factored(self.module, B, A)
        for p in layer.parameters():
            p.requires_grad_(weight.requires_grad)
        if bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)  # type: ignore[union-attr]
        return layer.train(self.module.training)


def _from_gram(M: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the triplets from the smaller Gram matrix; None where small or inaccurate."""
    wide = M if M.shape[1] <= M.shape[2] else M.mT
    halves = by_gram(wide.mT) if wide.shape[1] > 64 else None
    if halves is None:
        return None
    S, U = halves
    Vt = (U.mT @ wide) / S[..., None]
    return (U, S, Vt) if wide is M else (Vt.mT, S, U.mT)


def spectrum(S: Tensor) -> Tensor:
    """Return one spectrum (k) of a stack's singular values (b × k): s_j = √Σ s_j²."""
    return S.square().sum(0).sqrt()


def _conv(like: nn.Conv2d, weight: Tensor, groups: int, axes: tuple[bool, bool], last: bool = False) -> nn.Conv2d:
    """Return a convolution with this weight and, along the axes marked, the stride, padding and dilation of another.

    last: it takes the bias over.
    """
    by_name = isinstance(like.padding, str)
    padding = like.padding if by_name else tuple(p * on for p, on in zip(like.padding, axes, strict=True))
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], (weight.shape[2], weight.shape[3]),
        stride=_on(like.stride, axes), padding=padding, dilation=_on(like.dilation, axes),  # type: ignore[arg-type]
        groups=groups, bias=last and like.bias is not None, padding_mode=like.padding_mode, device="meta",
    )  # fmt: skip
    source = like.weight
    layout = torch.channels_last if source.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    if source.is_contiguous():
        layout = torch.contiguous_format
    conv.weight = nn.Parameter(weight.to(source.device, source.dtype).contiguous(memory_format=layout))
    if conv.bias is not None:
        conv.bias = nn.Parameter(like.bias.detach().clone())  # type: ignore[union-attr]
    return conv


def _on(values: tuple[int, ...], axes: tuple[bool, bool]) -> tuple[int, int]:
    """Return the values of each axis that is marked, 1 on the other."""
    return tuple(v if on else 1 for v, on in zip(values, axes, strict=True))  # type: ignore[return-value]
