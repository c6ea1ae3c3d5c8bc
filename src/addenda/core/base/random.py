"""Random tensors that are the same on every machine, for every release of torch, and different at every site.

torch's and numpy's *distributions* may change between releases and devices; the raw stream of numpy's counter-based
`Philox` bit generator may not (NEP 19 keeps bit generators stable). So raw 64-bit words are drawn here and turned into
numbers by IEEE additions, multiplications, divisions and square roots only, which every machine rounds alike.
A stream is keyed by a seed and any number of strings, usually the path of a site.
"""

import hashlib
from math import prod

import numpy as np
import torch
from torch import Tensor

_LN2 = 0.693147180559945309417232121458
# P. J. Acklam's rational approximation of the inverse normal distribution (relative error below 1.2e-9).
_A = (
    -39.69683028665376,
    220.9460984245205,
    -275.9285104469687,
    138.3577518672690,
    -30.66479806614716,
    2.506628277459239,
)
_B = (-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972, -13.28068155288572, 1.0)
_C = (-0.007784894002430293, -0.3223964580411365, -2.400758277161838, -2.549732539343734, 4.374664141464968,
      2.938163982698783)  # fmt: skip
_D = (0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416, 1.0)


class Stream:
    """A reproducible stream of random tensors. Shapes are tuples; floating results are float32 on the CPU."""

    def __init__(self, seed: int, *keys: str):
        self._from = (seed, *keys)
        digest = hashlib.sha256("\x1f".join([str(int(seed)), *keys]).encode()).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))

    def fork(self, key: str) -> "Stream":
        """Return another stream, which depends on how this one was keyed and not on what was drawn from it."""
        return Stream(*self._from, key)

    def raw(self, n: int) -> np.ndarray:
        """Draw `n` unsigned 64-bit words."""
        return self._bits.random_raw(n)

    def _unit(self, n: int) -> np.ndarray:
        """Draw `n` float64 numbers in (0, 1): the middle of one of 2^52 equal cells."""
        return ((self.raw(n) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = low + (high - low) * self._unit(prod(shape))
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    def kaiming_uniform(self, *shape: int) -> Tensor:
        """Draw from U(±1/√n), n the last dimension: torch's `kaiming_uniform_(a=√5)`, how thin factors start."""
        bound = float(np.sqrt(1.0 / shape[-1]))
        return self.uniform(*shape, low=-bound, high=bound)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        values = _inverse_normal(self._unit(prod(shape))) * std
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    def trunc_normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Draw from a normal distribution cut off at ± 2 std (std: before it is cut)."""
        edge = 0.022750131948179207  # Φ(−2)
        values = _inverse_normal(edge + (1 - 2 * edge) * self._unit(prod(shape))) * std
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    def integer(self, low: int, high: int) -> int:
        """Draw one integer from low to high, both included (bias below 2^-40 for ranges below 2^24)."""
        return low + int(self.raw(1)[0] % np.uint64(high - low + 1))

    def deal(self, n: int, parts: int) -> Tensor:
        """Deal n positions at random into `parts` parts of equal size (± 1): each one's part, from 0 (int8, int16)."""
        order = np.argsort(self.raw(n), kind="stable")
        dealt = np.empty(n, dtype=np.int8 if parts <= 127 else np.int16)
        dealt[order] = np.arange(n) * parts // max(n, 1)
        return torch.from_numpy(dealt)

    def choice(self, n: int, k: int) -> Tensor:
        """Draw `k` distinct positions out of `range(n)`, sorted, int64. Needs memory for k numbers, not for n."""
        if not 0 <= k <= n:
            raise ValueError(f"cannot draw {k} distinct positions out of {n}")
        if 2 * k > n:  # draw the ones left out
            keep = np.ones(n, dtype=bool)
            keep[self.choice(n, n - k).numpy()] = False
            return torch.from_numpy(np.flatnonzero(keep))
        positions = np.empty(0, dtype=np.int64)
        while len(positions) < k:
            drawn = (self.raw(k - len(positions) + 16) % np.uint64(n)).astype(np.int64)
            candidates = np.concatenate([positions, drawn])
            _, first = np.unique(candidates, return_index=True)
            positions = candidates[np.sort(first)][:k]  # in order of drawing, so that the cut at k favours no position
        return torch.from_numpy(np.sort(positions))


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c
    return total


def _log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithm by its atanh series: exact arithmetic only, so that no machine's libm matters."""
    mantissa, exponent = np.frexp(x)
    z = (mantissa - 0.75) / (mantissa + 0.75)
    z2, term, total = z * z, z.copy(), np.zeros_like(z)
    for k in range(12):
        total = total + term / (2 * k + 1)
        term = term * z2
    return 2.0 * total + (exponent * _LN2 + (-0.287682072451780927439219005993827))  # ln 0.75


def _inverse_normal(u: np.ndarray) -> np.ndarray:
    q = u - 0.5
    r = q * q
    middle = _polynomial(_A, r) * q / _polynomial(_B, r)
    tail = np.minimum(u, 1.0 - u)
    t = np.sqrt(-2.0 * _log(tail))
    outer = _polynomial(_C, t) / _polynomial(_D, t)
    return np.where(tail < 0.02425, np.where(u < 0.5, outer, -outer), middle)
