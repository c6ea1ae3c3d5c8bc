"""The K numbers of a model that have changed most, over all of its tensors together: exactly K, and in little memory.

    |θ − θ0| of every number, tensors in order;  the K largest, of equal ones those that come first

Numbers are looked at in chunks, several times, and no tensor of all changes is made: a float's bits, read as a whole
number, rise with it, so that counting by 16 bits at a time finds the K-th one exactly (radix selection). Beside the
positions themselves, 4 bytes each, it takes a few megabytes. A threshold alone would take all of equal numbers: where
fewer than K have changed, those that have not are equal, at 0, and the whole model would be chosen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.largest import narrow
from addenda.core.base.random import Stream

CHUNK = 1 << 17  # numbers that are looked at at once
_DIGIT, _DIGITS = 16, 1 << 16  # bits, and how many such numbers there are


@dataclass(frozen=True)
class Trained:
    """One tensor as it is trained, and as it was: of one shape."""

    path: str
    value: Tensor
    base: Tensor

    @property
    def size(self) -> int:
        return self.value.numel()


@torch.no_grad()
def most_changed(tensors: Sequence[Trained], k: int, taken: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the flat positions of the K largest |value − base|, rising, by path; paths without one are left out.

    taken: positions, rising, that are chosen already and not chosen again. Positions are int32 where these reach.
    Raises AddendaError where there are fewer than K, and for values that are not finite.
    """
    taken = taken or {}
    free = sum(t.size for t in tensors) - sum(map(len, taken.values()))
    if not 1 <= k <= free:
        raise AddendaError(f"There are {free:,} numbers to choose from, and k={k:,} of them cannot be.")
    scan = _Scan(tensors, taken, any(torch.float64 in (t.value.dtype, t.base.dtype) for t in tensors))
    least, missing = 0, k
    for shift in range(scan.bits - _DIGIT, -1, -_DIGIT):  # of the K-th largest, one digit after another
        counts = torch.zeros(_DIGITS, dtype=torch.int64)
        for t in tensors:
            for _, scores in scan.chunks(t):
                prefix = scores >> (shift + _DIGIT) if shift + _DIGIT < scan.bits else torch.zeros_like(scores)
                digits = (scores[(prefix == least) & (scores >= 0)] >> shift) & (_DIGITS - 1)
                counts += torch.bincount(digits, minlength=_DIGITS).cpu()
        beyond = counts.flip(0).cumsum(0)  # numbers whose digit is this or higher, the highest digit first
        at = int((beyond >= missing).nonzero()[0])
        missing -= int(beyond[at] - counts[_DIGITS - 1 - at])
        least = (least << _DIGIT) | (_DIGITS - 1 - at)
    found = {}
    for t in tensors:
        positions, missing = scan.collect(t, least, missing)
        if len(positions):
            found[t.path] = positions
    return found


def at_random(
    sizes: Mapping[str, int], k: int, seed: int, taken: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return K flat positions drawn from all tensors together, each as likely, as `most_changed` does.

    sizes: how many numbers each has, by path. Raises AddendaError where there are fewer than K.
    """
    taken = taken or {}
    free = sum(sizes.values()) - sum(map(len, taken.values()))
    if not 1 <= k <= free:
        raise AddendaError(f"There are {free:,} numbers to choose from, and k={k:,} of them cannot be.")
    drawn, found, start = Stream(seed, "positions", str(free)).choice(free, k), {}, 0
    for path, size in sizes.items():
        out = taken.get(path)
        count = size - (0 if out is None else len(out))
        first, last = torch.searchsorted(drawn, torch.tensor([start, start + count])).tolist()
        here, start = drawn[first:last] - start, start + count
        if out is not None and len(here):  # the n-th that is free: as many are before it as are taken before it
            here = here + torch.searchsorted(out.long() - torch.arange(len(out)), here, right=True)
        if len(here):
            found[path] = narrow(here, size)
    return found


@dataclass(frozen=True)
class _Scan:
    """A look at every change in order, chunk by chunk. wide: in float64."""

    tensors: Sequence[Trained]
    taken: Mapping[str, Tensor]
    wide: bool

    @property
    def bits(self) -> int:
        return 64 if self.wide else 32

    def chunks(self, t: Trained) -> Iterator[tuple[int, Tensor]]:
        """Yield (first flat position, bits of |value − base| as whole numbers) of every chunk; −1 at what is taken."""
        kind, whole = (torch.float64, torch.int64) if self.wide else (torch.float32, torch.int32)
        largest, taken = torch.tensor(torch.inf, dtype=kind).view(whole).item(), self.taken.get(t.path)
        for start, value, base in _pieces(t.value.detach(), t.base.detach()):
            scores = (value.to(kind) - base.to(kind)).abs_().flatten().view(whole)
            if int(scores.max()) >= largest:
                raise AddendaError(f"{t.path} has values that are not finite after training; nothing was chosen.")
            if taken is not None and len(taken):
                ends = torch.tensor([start, start + len(scores) - 1], dtype=taken.dtype)
                first = int(torch.searchsorted(taken, ends[0]))
                last = int(torch.searchsorted(taken, ends[1], right=True))
                scores[(taken[first:last].long() - start).to(scores.device)] = -1
            yield start, scores

    def collect(self, t: Trained, least: int, level: int) -> tuple[Tensor, int]:
        """Return the positions above `least` and the first `level` of those equal to it, and what is left of these."""
        above = equal = 0
        for _, scores in self.chunks(t):
            above, equal = above + int((scores > least).sum()), equal + int((scores == least).sum())
        equal = min(equal, level)
        positions, count, left = torch.empty(above + equal, dtype=narrow(torch.empty(0), t.size).dtype), 0, equal
        for start, scores in self.chunks(t) if len(positions) else ():
            chosen = scores > least
            if left:
                ties = (scores == least).nonzero().flatten()[:left]
                chosen[ties] = True
                left -= len(ties)
            here = chosen.nonzero().flatten()
            positions[count : count + len(here)] = here.cpu() + start
            count += len(here)
        return positions, level - equal


def _pieces(value: Tensor, base: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first flat position, values, base) of pieces of some rows, or of a row, of at most `CHUNK` numbers."""
    if value.dim() < 2:
        for start in range(0, value.numel(), CHUNK):
            yield start, value.reshape(-1)[start : start + CHUNK], base.reshape(-1)[start : start + CHUNK]
        return
    width = value[0].numel()
    if width > CHUNK:
        for row in range(len(value)):
            yield from ((row * width + start, v, b) for start, v, b in _pieces(value[row], base[row]))
        return
    rows = CHUNK // width
    for row in range(0, len(value), rows):
        yield row * width, value[row : row + rows], base[row : row + rows]
