"""Linear layers of two thin products: what a compressed model has in the places of its dense ones.

    down_proj (LowRankLinear)          down_proj (PivotLinear)
    ├── first   Linear n → r           ├── first   Linear n → r         r of the outputs themselves
    └── second  Linear r → m           ├── rest    Linear r → m − r     the others, as combinations of these
                                       └── order   which is which

The thin products are ordinary Linears, so adapters attach to them, and quantisation takes them, like any other.
"""

from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError


class LowRankLinear(nn.Module):
    """A linear layer of two thin ones: y = B (A x) + b, A = first.weight (r × n), B = second.weight (m × r).

    x (…, n), y (…, m), b = second.bias."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    @property
    def weight(self) -> Tensor:
        """The product B A (m × n), multiplied out at every look: for models that ask a layer for its weight."""
        return self.second.weight @ self.first.weight

    @classmethod
    def of(cls, B: Tensor, A: Tensor, bias: Tensor | None, dtype: torch.dtype, device=None) -> "LowRankLinear":
        """Return the layer with copies of these factors (m × r and r × n), rounded once."""
        pair = cls(A.shape[1], B.shape[0], A.shape[0], bias is not None, device="meta", dtype=dtype)
        for layer, weight in ((pair.first, A), (pair.second, B)):
            layer.weight = _copy(weight, device, dtype)
        if bias is not None:
            pair.second.bias = _copy(bias, device, dtype)
        return pair

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.rank} → {self.out_features}"


class PivotLinear(nn.Module):
    """A low-rank layer with r² fewer numbers: r of the outputs are computed, the others combined from them.

    y[order] = [h ; T h] + b[order], h = first.weight x (r), T = rest.weight (m − r × r). Every r < min(m, n) saves.
    """

    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        if not 1 <= rank < out_features:
            raise AddendaError(f"A pivoted layer of {out_features} outputs has a rank below that, got {rank}.")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.rest = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.arange(out_features, device=device))  # where in [h ; T h] output i stands

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = torch.cat([h, self.rest(h)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight (m × n), multiplied out at every look."""
        A = self.first.weight
        return torch.cat([A, self.rest.weight @ A])[self.order]

    @classmethod
    def of(cls, B: Tensor, A: Tensor, bias: Tensor | None, dtype: torch.dtype, device=None) -> "PivotLinear":
        """Return the layer whose product is B A; the outputs kept are the pivots of a QR factorisation of Bᵀ."""
        from scipy.linalg import qr

        m, r = B.shape
        pivot_layer = cls(A.shape[1], m, r, bias is not None, device="meta", dtype=dtype)
        factorisation: Any = qr(B.T.double().cpu().numpy(), mode="r", pivoting=True)
        pivots = torch.from_numpy(factorisation[1]).long().to(B.device)
        top, bottom = B.double()[pivots[:r]], B.double()[pivots[r:]]
        T = torch.linalg.solve(top, bottom, left=False)
        for layer, weight in ((pivot_layer.first, top @ A.double()), (pivot_layer.rest, T)):
            layer.weight = _copy(weight, device, dtype)
        pivot_layer.order = torch.argsort(pivots).to(B.device if device is None else device)
        if bias is not None:
            pivot_layer.bias = _copy(bias, device, dtype)
        return pivot_layer

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.rank} → {self.out_features}, pivoted"


def _copy(values: Tensor, device, dtype: torch.dtype) -> nn.Parameter:
    copy = values.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=False)


FORMS: dict[str, type[LowRankLinear] | type[PivotLinear]] = {"factors": LowRankLinear, "pivot": PivotLinear}
