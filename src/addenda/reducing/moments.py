"""What a layer's inputs look like: their second moment, mean and mean size, in float64, padding left out."""

from functools import cached_property

import torch
from torch import Tensor

_BLOCK = 4096  # rows turned to float64 at a time
_SMALL = 256  # columns: no part of a symmetric product is cut below that


class Moments:
    """Sums over the rows x (n) that one distinct input of a model has had. Layers with one input share one of these.

    The result does not depend on how the rows come in batches, beyond float64 rounding.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        zeros = {"dtype": torch.float64, "device": device}
        self.count = 0
        self._upper = torch.zeros(width, width, **zeros)  # Σ x xᵀ, on and above the diagonal
        self.sum = torch.zeros(width, **zeros)
        self.sum_size = torch.zeros(width, **zeros)  # Σ |x|

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Add rows (tokens × n) of any floating dtype."""
        for part in rows.split(_BLOCK):
            x = part.double()
            _add_square(self._upper, x)
            self.sum += x.sum(0)
            self.sum_size += x.abs().sum(0)
        self.count += len(rows)
        self.__dict__.pop("root", None)

    @property
    def second(self) -> Tensor:
        """The second moment C = E[x xᵀ], n × n, uncentred."""
        return (self._upper.triu() + self._upper.triu(1).T) / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.count, 1)

    @property
    def size(self) -> Tensor:
        """The mean size E|x|, n."""
        return self.sum_size / max(self.count, 1)

    @cached_property
    def root(self) -> Tensor:
        """A root R, n × n, with R Rᵀ = C: the eigenvectors scaled. Exists for a singular C too."""
        return square_root(self.second)


def _add_square(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x to total on and above the diagonal; most of what is below is left out: up to half of the work."""
    n = x.shape[1]
    if n <= 2 * _SMALL:
        total.addmm_(x.T, x)
        return
    a, b = x[:, : n // 2], x[:, n // 2 :]
    _add_square(total[: n // 2, : n // 2], a)
    total[: n // 2, n // 2 :].addmm_(a.T, b)
    _add_square(total[n // 2 :, n // 2 :], b)


def square_root(C: Tensor) -> Tensor:
    """Return R with R Rᵀ = C, for a symmetric C, eigenvalues ≥ 0 up to rounding, or a vector: its diagonal."""
    if C.dim() == 1:
        return C.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp_min(0).sqrt()
