"""Codes of a few bits in bytes, with none left over: eight codes of b bits in b bytes, the first in the lowest bits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, bits ≤ 7, in any shape, as ⌈number / 8⌉ · bits bytes."""
    flat = codes.flatten()
    each = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8).long()
    words = (each << bits * torch.arange(8, device=codes.device)).sum(1)
    return (words[:, None] >> 8 * torch.arange(bits, device=codes.device)).bitwise_and(255).to(torch.uint8).flatten()


def unpack(held: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, as uint8."""
    wide = torch.int32 if bits < 4 else torch.int64  # eight codes in one word
    parts = held.view(-1, bits).to(wide) << 8 * torch.arange(bits, dtype=wide, device=held.device)
    words = parts.sum(1, dtype=wide)
    codes = (words[:, None] >> bits * torch.arange(8, dtype=wide, device=held.device)).bitwise_and(2**bits - 1)
    return codes.to(torch.uint8).flatten()[:count]
