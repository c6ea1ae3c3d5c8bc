"""What prompt and prefix tuning share: offsets of the first tokens of every sequence, which hold the place of a prompt.

    y'_j = y_j + P_j   for the first tokens j < P;   the rest as it is         P: places × d

A hidden method keeps the length of a sequence, and with it masks, positions and labels. So the prompt's places are in
the batch: put P tokens in front of every example, attended to (mask 1) and without labels (-100). Which ids they have
is where the prompt starts from: pad tokens, or words that describe the task. The offsets start at zero, so the start
is exact: the base on the same ids.

The places are the first of every row, also where padding follows them. In evaluation a sequence of no more than P
tokens is left as it is: those are the later steps of generation with a cache. In training that is an error.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.errors import AddendaError
from addenda.core.hidden import HiddenMethod
from addenda.core.method import Params
from addenda.core.random import Stream


@dataclass(frozen=True)
class Leading(HiddenMethod):
    """places: P, how many tokens the prompt takes."""

    sized_by: ClassVar[str] = "places"
    places: int = 16

    def validate(self):
        if self.places < 1:
            yield f"places must be at least 1, got {self.places}"

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        return {"offset": nn.Parameter(torch.zeros(self.places, width))}

    def change(self, x: Tensor, y: Tensor, p: Params, training: bool = False) -> Tensor:
        if y.dim() < 3 or (training and y.shape[-2] <= self.places):
            raise AddendaError(
                f"{self.name} wants (batch, tokens, width) with {self.places} places for the prompt in front of each "
                f"example; a layer returned {tuple(y.shape)}. Put that many tokens in front of it."
            )
        if y.shape[-2] <= self.places:
            return y
        changed = y[..., : self.places, :] + p["offset"].to(y.dtype)
        return torch.cat([changed, y[..., self.places :, :]], -2)

    def trainable(self, width: int) -> int:
        return self.places * width
