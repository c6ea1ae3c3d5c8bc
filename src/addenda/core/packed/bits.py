"""Packing codes of a few bits into bytes: eight codes of b bits in b bytes, the first in the lowest bits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def code_bytes(numbers: int, bits: int) -> int:
    """Return the bytes that so many codes take: ⌈numbers · bits / 8⌉."""
    return (numbers * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes (… × ⌈n · bits / 8⌉) of codes (… × n) below 2^bits, bits ≤ 8."""
    n = codes.shape[-1]
    eights = F.pad(codes, (0, -n % 8)).long().unflatten(-1, (-(-n // 8), 8))
    words = (eights << bits * torch.arange(8, device=codes.device)).sum(-1)
    parts = words[..., None] >> 8 * torch.arange(bits, device=codes.device) & 255
    return parts.to(torch.uint8).flatten(-2)[..., : code_bytes(n, bits)].contiguous()


def unpack(held: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes (… × count) in bytes (… × ⌈count · bits / 8⌉), as uint8."""
    wide = torch.int32 if bits < 4 else torch.int64  # eight codes in one word
    short = -held.shape[-1] % bits
    parts = (F.pad(held, (0, short)) if short else held).unflatten(-1, (-(-count // 8), bits)).to(wide)
    words = (parts << 8 * torch.arange(bits, dtype=wide, device=held.device)).sum(-1, dtype=wide)
    codes = words[..., None] >> bits * torch.arange(8, dtype=wide, device=held.device) & 2**bits - 1
    return codes.to(torch.uint8).flatten(-2)[..., :count]
