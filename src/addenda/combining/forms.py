"""A combined change as an adapter holds it: two thin matrices, entries at positions, or a whole copy of the weight."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.combining.spaces import Low, norm, total
from addenda.core.base.largest import narrow
from addenda.core.method.contract import Method, Params
from addenda.core.site.site import Site
from addenda.methods.full import Full
from addenda.methods.lora import LoRA
from addenda.methods.shira import SHiRA


class Form(NamedTuple):
    """A site's method and tensors, what they are called, and the change of each matrix as these hold it."""

    method: Method
    tensors: Params
    says: str
    held: list[Low | Tensor]

    @property
    def numbers(self) -> int:
        """How many numbers are held, positions not counted."""
        return sum(t.numel() for t in self.tensors.values() if t.is_floating_point())


def thin(changes: Sequence[Low], stacked: bool) -> Form:
    """Return a LoRA of scale 1 that is B A at each matrix; in a stack all have the rank of the highest."""
    rank = max(c.rank for c in changes)
    B = torch.stack([F.pad(c.B, (0, rank - c.rank)) for c in changes]).float()
    A = torch.stack([F.pad(c.A, (0, 0, 0, rank - c.rank)) for c in changes]).float()
    held = [Low(b, a) for b, a in zip(B.double(), A.double(), strict=True)]
    own: Params = {"A": A, "B": B} if stacked else {"A": A[0], "B": B[0]}
    return Form(LoRA(rank=rank), own, f"rank {rank}", [*held])


def sparse(changes: Sequence[Tensor], stacked: bool) -> Form:
    """Return a SHiRA of the entries that are not 0; in a stack each has as many as the one with most."""
    count = max(1, max(int((D != 0).sum()) for D in changes))
    index = torch.stack([_positions(D, count) for D in changes])
    values = torch.stack([D.flatten()[i] for D, i in zip(changes, index, strict=True)]).float()
    held = [
        torch.zeros_like(D).flatten().scatter(0, i, v.double()).view_as(D)
        for D, i, v in zip(changes, index, values, strict=True)
    ]
    at = narrow(index, changes[0].numel())
    own: Params = {"values": values, "index": at} if stacked else {"values": values[0], "index": at[0]}
    return Form(SHiRA(count=count, mask="given"), own, "sparse", [*held])


def _positions(D: Tensor, count: int) -> Tensor:
    """Return `count` sorted positions with all entries that are not 0 among them."""
    flat = D.flatten() != 0
    spare = count - int(flat.sum())
    if spare:
        flat[torch.nonzero(~flat).flatten()[:spare]] = True
    return torch.nonzero(flat).flatten()


def whole(changes: Sequence[Tensor], site: Site) -> Form:
    """Return a float32 copy of the weight with the change in it, which rounds the change as it does the weight."""
    W = site.matrix.cpu().double()
    matrices = list(W) if W.dim() > 2 else [W]
    values = [(w + D).float() for w, D in zip(matrices, changes, strict=True)]
    held = [v.double() - w for v, w in zip(values, matrices, strict=True)]
    return Form(Full(), {"value": torch.stack(values) if W.dim() > 2 else values[0]}, "copy", [*held])


def distance(one: Low | Tensor, other: Low | Tensor) -> float:
    """Return the Frobenius norm of the difference of two changes, from the factors where both are products."""
    if isinstance(one, Low) and isinstance(other, Low):
        return norm(total([one, other], [1.0, -1.0]))
    return float((dense(one) - dense(other)).norm())


def size(change: Low | Tensor) -> float:
    """Return the Frobenius norm of a change."""
    return norm(change) if isinstance(change, Low) else float(change.norm())


def dense(change: Low | Tensor) -> Tensor:
    """Return a change as the matrix or vector that it is."""
    return change.dense() if isinstance(change, Low) else change
