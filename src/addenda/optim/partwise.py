"""AdamW that leaves parts alone which no gradient reached: for MoSA, whose step trains one part of a matrix of many.

    part k of a tensor: the entries that the method deals to k.  No gradient in any of them, in this step: its numbers,
    its moments and its step count stay as they are, bit for bit, and no weight decay acts on it.

Plain AdamW moves such entries on by momentum and decay. The rest, and what it costs, is in `optim.reached`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.optim.reached import Reached
from addenda.optim.registry import optimizer


@optimizer("partwise-adamw", paper="Zhang et al. 2023, arXiv:2312.02923")
class PartwiseAdamW(Reached):
    """AdamW that leaves parts of a tensor without a gradient entirely as they are."""

    def take(self, adapter: Adapter) -> list[Tensor]:
        self.parts: list[tuple[Tensor, Tensor, int]] = []  # (trained, the part of each of its entries, the last part)
        for _, t in adapter.sites():
            dealt = t.method.dealt(t.tensors())
            own = [(p, dealt[k]) for k, p in t.named_parameters() if k in dealt and p.requires_grad]
            self.parts += [(p, part, _last(part)) for p, part in own]
        if not self.parts:
            raise AddendaError(
                f"'partwise-adamw' trains tensors whose entries are dealt out to parts, and adapter {adapter.name!r} "
                f"({adapter.kinds}) has none. Take 'adamw'."
            )
        return [p for p, *_ in self.parts]

    def moves(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield one update for each part that is reached: of many parts these are few."""
        for p, part, last in self.parts:
            if p.grad is None:
                continue
            steps = self.steps(p, last + 1)
            if not last:
                continue
            reached = torch.bincount((part * (p.grad != 0)).flatten(), minlength=len(steps)) > 0
            for k in reached[1:].nonzero()[:, 0].add(1).tolist():  # 0 stands for entries without a gradient
                steps[k] += 1
                yield p, (part == k).to(p.dtype), float(steps[k])


def _last(part: Tensor) -> int:
    """Return the number of the last part; 0 where there is no data, as when `plan` asks what an optimizer keeps."""
    return 0 if isinstance(part, FakeTensor) else int(part.max())
