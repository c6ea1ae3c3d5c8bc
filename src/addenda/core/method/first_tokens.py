"""Prompt and prefix tuning's common part: offsets of the first tokens of every sequence, where a prompt stands.

    y'_j = y_j + P_j   for the first tokens j < P;   the rest as it is         P: places × d

A hidden method keeps the length of a sequence, and with it masks, positions and labels. So the prompt's places are in
the batch: put P tokens in front of every example, attended to (mask 1) and without labels (-100). Which ids they have
is where the prompt starts from: pad tokens, or words that describe the task. The offsets start at zero, so the start
is exact: the base on the same ids.

The places are the first tokens of every example that are no padding, on either side of it: what the attention mask
leaves out is not counted. What comes behind a cache of n tokens goes on from there (`core.state.cache_length`): its
first tokens have the places n, n + 1, …, and where n ≥ P all is left as it is. So chats of several turns, prompts in
chunks and generation give what the whole sequence would, and every example what it gives alone. A model that is given
no mask, and one that takes none, attends to padding itself: there the first tokens of a row are its places. A model
that does not say how long its cache is (one without `get_seq_length`, or no such argument) is taken to be at its first
token, but in evaluation a sequence of no more than P tokens is left as it is there, as a later step of generation: give
such a model what follows a cache in longer pieces and they are changed, wrongly. In training no sequence may be so
short.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.method.contract import Params
from addenda.core.method.hidden import HiddenMethod


@dataclass(frozen=True)
class Leading(HiddenMethod):
    """A method that adds trained offsets to the first tokens of every sequence. places: P, how many tokens."""

    sized_by: ClassVar[str] = "places"
    follows: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    places: int = 16

    def validate(self):
        if self.places < 1:
            yield f"places must be at least 1, got {self.places}"

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        return {"offset": nn.Parameter(torch.zeros(self.places, width))}

    def change(
        self,
        x: Tensor,
        y: Tensor,
        p: Params,
        training: bool = False,
        past: int | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if y.dim() < 3 or (training and y.shape[-2] <= self.places):
            raise AddendaError(
                f"{self.name} wants (batch, tokens, width) with {self.places} places for the prompt in front of each "
                f"example; a layer returned {tuple(y.shape)}. Put that many tokens in front of it."
            )
        offset, length = p["offset"].to(y.dtype), y.shape[-2]
        if mask is not None:
            place = (0 if past is None else past) + mask.cumsum(-1) - 1
            prompt_mask = mask & (place < self.places)
            return y + offset[place.clamp(0, self.places - 1)] * prompt_mask[..., None]
        if isinstance(past, Tensor):  # not known on the host
            place = past + torch.arange(length, device=y.device)
            return y + offset[place.clamp(max=self.places - 1)] * (place < self.places)[:, None]
        if past is None:
            past = 0 if length > self.places else self.places
        if past >= self.places:
            return y
        offset = offset[past : past + length]
        return torch.cat([y[..., : len(offset), :] + offset, y[..., len(offset) :, :]], -2)

    def trainable(self, width: int) -> int:
        return self.places * width
