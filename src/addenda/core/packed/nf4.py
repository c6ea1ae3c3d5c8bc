"""NF4: weights in 4 bits, in plain torch.

Blocks of 64 weights in stored order are divided by their largest size and rounded to the nearest of 16 levels, which
are quantiles of a normal distribution, with −1, 0 and 1 among them (Dettmers et al. 2023, arXiv:2305.14314). The scales
are kept in 8 bits themselves: of 256 blocks at a time the largest in float32, the others as one of 255 fractions of it,
evenly spaced in their logarithm over 8 octaves, so that one large block costs its neighbours nothing. Levels are chosen
for the scale as it is kept. In all 4 + 8/64 + 32/(64 · 256) = 4.127 bits a weight.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.packed.tensor import Packed, finite

BLOCK, GROUP, OCTAVES = 64, 256, 8.0
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4Tensor(Packed):
    """A weight in NF4. codes: two weights a byte; scales: a byte a block; tops: a float32 a group of blocks."""

    parts = ("codes", "scales", "tops")
    codes: Tensor
    scales: Tensor
    tops: Tensor

    @classmethod
    def of(cls, W: Tensor) -> "NF4Tensor":
        """Pack W, in any shape and stored order; zeros fill up the last block. Raises AddendaError for NaN or ∞."""
        flat = finite(W, "NF4").flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        tops = F.pad(largest, (0, -len(largest) % GROUP)).view(-1, GROUP).amax(1)
        octave = torch.log2(largest / _each_block(tops, largest)).nan_to_num(0.0, neginf=-OCTAVES)
        scales = ((255 + octave * (254 / OCTAVES)).round().clamp(1, 255) * (largest > 0)).to(torch.uint8)
        scaled = blocks / _scale(scales, tops).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        levels = _levels(flat.device)
        codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
        tensors = {"codes": codes[:, 0] << 4 | codes[:, 1], "scales": scales, "tops": tops}
        return cls(tensors, W.shape, W.dtype)

    def unpack(self) -> Tensor:
        blocks = _pairs(self.codes.device)[self.codes.int()].view(-1, BLOCK) * _scale(self.scales, self.tops)[:, None]
        return blocks.flatten()[: self.numel()].view(self.shape)


def _each_block(tops: Tensor, blocks: Tensor) -> Tensor:
    return tops.repeat_interleave(GROUP)[: len(blocks)]


def _scale(scales: Tensor, tops: Tensor) -> Tensor:
    """Return the factor of every block; 0 where all of it is 0."""
    factor = _each_block(tops, scales) * torch.exp2((scales.float() - 255) * (OCTAVES / 254))
    return factor * (scales > 0)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return (256 × 2) the two levels of every byte."""
    byte = torch.arange(256, device=device)
    return torch.stack([_levels(device)[byte >> 4], _levels(device)[byte & 15]], 1)
