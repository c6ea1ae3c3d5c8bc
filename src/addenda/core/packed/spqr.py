"""SpQR-style weights: 3 bits in groups of 16, scales and zeros in 3 bits themselves, and one weight in a hundred whole.

Along the inputs 16 weights of a row share a scale s and a zero z, and each is s (c − z) for a code c of 3 bits, or
another number. Of 16 rows at a time the scales, and the zeros, are kept as codes of 3 bits between their least and
their greatest. The weights that cost their group most are outliers: kept as float16, with their column, and left out
of the fit. So

    bits = b + (3 + 3)/16 + 64/256 + 32 · outliers + 32/n + 64/(m n)

for a weight of m × n, both multiples of 16, and codes of b bits (3; with 4 it is near lossless).

Everything in float16 is in units of the weight's root mean square. With the second moment C of the layer's inputs, the
columns are rounded one after the other, and those to come make up for the error so far (GPTQ); without it each weight
is rounded to the nearest. Dettmers et al. 2023, arXiv:2306.03078; which weights are outliers is decided once, before
the columns are gone through, so that their number is exact.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.packed.bits import pack, unpack
from addenda.core.packed.tensor import Packed, finite

BITS, GROUP, TOP = 3, 16, 7  # of scales and zeros
_RANGES = (1.0, 0.9, 0.8, 0.7)  # shares of a group's range, tried for the scale with the least error
_TOGETHER = 3  # of a group's weights, at most, are tried as outliers at once
_BLOCK = 128  # columns whose errors are passed on to the others together


class SpQRTensor(Packed):
    """A weight in SpQR's form: codes in a few bits, and the outliers whole.

    codes: a few bits a weight; scales, zeros: 3 bits a group; levels: float16 (⌈m/16⌉ × ⌈n/16⌉ × 4), the least and
    the step of 16 scales, then of their zeros; values, columns, rows: the outliers, by row as in CSR; unit: float32.
    """

    parts = ("codes", "scales", "zeros", "levels", "values", "columns", "rows", "unit")
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    levels: Tensor
    values: Tensor
    columns: Tensor
    rows: Tensor
    unit: Tensor

    @classmethod
    def of(
        cls, W: Tensor, C: Tensor | None = None, *, bits: int = 3, outliers: float = 0.01, damp: float = 0.01
    ) -> "SpQRTensor":
        """Pack W (m × n), minding C: E[x xᵀ] of the layer's inputs (n × n).

        bits: of a weight's code; outliers: their share; damp: what is added to C's diagonal, as a share of its mean.

        Raises AddendaError for NaN or ∞, another shape, more than 65,536 columns, and options out of range.
        """
        if W.dim() != 2 or W.shape[1] > 1 << 16:
            raise AddendaError(f"SpQR takes matrices of up to 65,536 columns, got a weight of shape {tuple(W.shape)}.")
        if not (2 <= bits <= 7 and 0 <= outliers < 1 and damp > 0):
            raise AddendaError(
                f"Expected bits in 2 … 7, outliers in [0, 1) and damp > 0, got {bits}, {outliers} and {damp}."
            )
        if C is not None and C.shape != (W.shape[1],) * 2:
            raise AddendaError(f"Expected C of {W.shape[1]} × {W.shape[1]}, got {tuple(C.shape)}.")
        values = finite(W, "SpQR")
        unit = values.square().mean().sqrt()
        w = values / unit.clamp_min(torch.finfo(torch.float32).tiny)
        w = F.pad(w, (0, -w.shape[1] % GROUP))
        U = None if C is None else _inverse_root(C, damp, w.shape[1]).to(w)
        weight = torch.ones_like(w[0]) if U is None else U.diagonal().square().reciprocal()
        out = _outliers(w, weight, bits, round(outliers * W.numel()))
        codes, levels, swept = _swept(w, out, weight, bits, U)
        positions = out.nonzero()
        columns = positions[:, 1].to(torch.int32)
        tensors = {
            "codes": pack(codes.flatten(), bits),
            "scales": pack(levels.scales.flatten(), BITS),
            "zeros": pack(levels.zeros.flatten(), BITS),
            "levels": levels.table,
            "values": swept[out].half(),
            "columns": torch.where(columns < 1 << 15, columns, columns - (1 << 16)).to(torch.int16),
            "rows": F.pad(out.sum(1).cumsum(0), (1, 0)).to(torch.int32),
            "unit": unit.reshape(1),
        }
        return cls(tensors, W.shape, W.dtype, (bits,))

    def again(self, W: Tensor) -> "SpQRTensor":
        return self.of(W, bits=self.extra[0], outliers=len(self.values) / self.numel())

    def unpack(self) -> Tensor:
        m, n = self.shape
        across, down = -(-n // GROUP), -(-m // GROUP)
        levels = Levels(
            unpack(self.scales, BITS, down * GROUP * across).view(-1, across),
            unpack(self.zeros, BITS, down * GROUP * across).view(-1, across),
            self.levels,
        )
        s, z = (t[:m, :, None] for t in levels.dense())
        w = ((unpack(self.codes, self.extra[0], m * across * GROUP).view(m, across, GROUP) - z) * s).flatten(1)[:, :n]
        positions = torch.arange(len(self.values), dtype=torch.int32, device=w.device)
        rows = torch.bucketize(positions, self.rows[1:], right=True)
        w = w.index_put((rows, self.columns.long() & 0xFFFF), self.values.float())
        return w * self.unit


class Levels(NamedTuple):
    """Scales and zeros as codes (rows in whole sixteens × groups), and the table of their least values and steps."""

    scales: Tensor
    zeros: Tensor
    table: Tensor

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return the scales and the zeros as numbers (rows × groups)."""
        t = self.table.float().repeat_interleave(GROUP, 0)
        return t[..., 0] + t[..., 1] * self.scales, t[..., 2] + t[..., 3] * self.zeros


def _coded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, least and step) of values (rows × groups), 16 rows at a time; the last row fills up the last."""
    fold = torch.cat([values, values[-1:].expand(-len(values) % GROUP, -1)]).view(-1, GROUP, values.shape[1])
    least = fold.amin(1).half()
    step = ((fold.amax(1) - least) / TOP).half()
    codes = ((fold - least[:, None]) / step[:, None].float().clamp_min(1e-12)).round().clamp(0, TOP)
    return codes.to(torch.uint8).flatten(0, 1), torch.stack([least, step], -1)


def _fitted(w: Tensor, out: Tensor, weight: Tensor, top: int, ranges: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return the scale and zero (each …) of groups w (… × 16) with the least error, over some shares of their range."""
    inliers = w.masked_fill(out, 0)
    low, high = inliers.amin(-1).clamp_max(0), inliers.amax(-1).clamp_min(0)
    best = scale = zero = torch.empty(0)
    for shrink in ranges:
        s = (high - low) * (shrink / top)
        z = (top / 2 - (high + low) / 2 / s.clamp_min(1e-12)).clamp(0, top)
        error = ((_rounded(w, s[..., None], z[..., None], top)[1] - w).square() * weight).masked_fill(out, 0).sum(-1)
        if shrink == ranges[0]:
            best, scale, zero = error, s, z
        scale, zero = torch.where(error < best, s, scale), torch.where(error < best, z, zero)
        best = torch.minimum(error, best)
    return scale, zero


def _rounded(w: Tensor, s: Tensor, z: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return codes from 0 to top, and the numbers that they stand for."""
    codes = (w / s.clamp_min(1e-12) + z).round().clamp(0, top)
    return codes, (codes - z) * s


def _levels(w: Tensor, out: Tensor, weight: Tensor, top: int) -> Levels:
    """Return the levels of groups w (m × groups × 16). The zeros are chosen for the scales as they are kept."""
    scale, _ = _fitted(w, out, weight, top, _RANGES)
    scales, table = _coded(scale)
    dense = Levels(scales, scales, torch.cat([table, table], -1)).dense()[0][: len(w)]
    inliers = w.masked_fill(out, 0)
    middle = (inliers.amin(-1).clamp_max(0) + inliers.amax(-1).clamp_min(0)) / 2
    zeros, zero_table = _coded((top / 2 - middle / dense.clamp_min(1e-12)).clamp(0, top))
    return Levels(scales, zeros, torch.cat([table, zero_table], -1))


def _outliers(w: Tensor, weight: Tensor, bits: int, count: int) -> Tensor:
    """Return a mask as w (m × n) of the `count` weights whose absence lowers the error of their group most."""
    groups, weight = w.unflatten(1, (-1, GROUP)), weight.view(-1, GROUP)
    nothing, top = torch.zeros_like(groups, dtype=torch.bool), 2**bits - 1

    def errors(out: Tensor) -> Tensor:
        s, z = _fitted(groups, out, weight, top, _RANGES[:1])
        return ((_rounded(groups, s[..., None], z[..., None], top)[1] - groups).square() * weight).masked_fill(out, 0)

    costs = errors(nothing)
    farthest = groups.abs().topk(_TOGETHER, -1).indices
    remainders = [costs.sum(-1)]  # the group's error without its k largest
    remainders += [errors(nothing.scatter(-1, farthest[..., :k], True)).sum(-1) for k in range(1, _TOGETHER + 1)]
    gain = costs.clone()  # two that are far out hide each other: what the first one spares may show with the second
    for r in range(_TOGETHER):
        best = torch.stack([(remainders[r] - remainders[k]) / (k - r) for k in range(r + 1, _TOGETHER + 1)]).amax(0)
        gain.scatter_(-1, farthest[..., r : r + 1], best[..., None])
    return nothing.flatten().index_fill(0, gain.flatten().topk(count).indices, True).view_as(w)


def _swept(w: Tensor, out: Tensor, weight: Tensor, bits: int, U: Tensor | None) -> tuple[Tensor, Levels, Tensor]:
    """Round w all at once, or column by column with U: (codes, levels, the weights as they were at their turn)."""
    top = 2**bits - 1
    groups, masks, weight = w.unflatten(1, (-1, GROUP)), out.unflatten(1, (-1, GROUP)), weight.view(-1, GROUP)
    if U is None:
        levels = _levels(groups, masks, weight, top)
        s, z = (t[: len(w), :, None] for t in levels.dense())
        return _rounded(groups, s, z, top)[0].to(torch.uint8), levels, w
    w, codes = w.clone(), torch.empty_like(w, dtype=torch.uint8)
    level_parts: list[Levels] = []
    for start in range(0, w.shape[1], _BLOCK):
        end = min(start + _BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            if j % GROUP == 0:
                part = slice(j, j + GROUP)
                level_parts.append(_levels(w[:, None, part], out[:, None, part], weight[j // GROUP], top))
                s, z = (t[: len(w), 0] for t in level_parts[-1].dense())
            column = w[:, j]
            code, near = _rounded(column, s, z, top)
            codes[:, j] = code
            near = torch.where(out[:, j], column.half().float(), near)
            errors[:, j - start] = error = (column - near) / U[j, j]
            w[:, j + 1 : end] -= error[:, None] * U[j, j + 1 : end]
        w[:, end:] -= errors @ U[start:end, end:]
    scales, zeros, tables = (torch.cat(parts, 1) for parts in zip(*level_parts, strict=True))
    return codes, Levels(scales, zeros, tables), w


def _inverse_root(C: Tensor, damp: float, width: int) -> Tensor:
    """Return U, upper triangular, Uᵀ U = (C + damp · mean(diag C))⁻¹; columns that fill the last group stay apart."""
    H = C.double()
    ridge = H.diagonal().mean().clamp_min(1e-30) * damp
    H = H / ridge + torch.eye(len(H), dtype=H.dtype, device=H.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    padded = torch.eye(width, dtype=U.dtype, device=U.device)
    padded[: len(U), : len(U)] = U
    return padded
