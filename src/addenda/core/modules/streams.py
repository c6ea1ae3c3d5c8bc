"""Dropout in a batch of several groups of rows: each group draws from a generator of its own.

What a group draws is what it would draw alone, in the same order and at its own length, so that its numbers do not
depend on who is beside it. Inside of `Streams`, torch's functions that drop (dropout, and attention with dropout) draw
by group; whoever draws by itself asks `kept`. On a CPU the bits are those of torch's own functions after
`torch.manual_seed`; a GPU's fused kernels draw others.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Stream:
    """A group of rows of a batch. length: of its own rows, which others may have made longer; None: of all."""

    rows: int
    generator: torch.Generator
    length: int | None = None


def drops(model: nn.Module) -> bool:
    """Return whether a module of the model says that it drops something in training."""
    return any(
        isinstance(v, int | float) and v > 0
        for m in model.modules()
        for k, v in vars(m).items()
        if "drop" in k or (k == "p" and isinstance(m, nn.modules.dropout._DropoutNd))
    )


class Streams(TorchFunctionMode):
    """A `with` block in which dropout draws by group. long: how many tokens the rows of the batch have, padding too."""

    def __init__(self, streams: Sequence[Stream], long: int | None = None):
        super().__init__()
        self.streams: Sequence[Stream] = streams
        self.long = long

    @contextmanager
    def only(self, stream: Stream | None):
        """Let what runs in a `with` block be this group's alone; None: nobody's, and torch draws as ever."""
        outer, self.streams = self.streams, () if stream is None else (stream,)
        try:
            yield
        finally:
            self.streams = outer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.streams:
            return func(*args, **kwargs)
        if func is torch.Tensor.bernoulli_ and len(self.streams) == 1 and "generator" not in kwargs:
            return func(*args, **kwargs, generator=self.streams[0].generator)
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return input
        if p >= 1:
            return input.zero_() if inplace else input * 0
        factors = self.kept(input, [p] * len(self.streams)).to(input.dtype).div_(1 - p)
        return input.mul_(factors) if inplace else input * factors

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor:
        """Return what torch's attention does on a CPU where it drops."""
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        root = math.sqrt(scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
        weights = (query * root) @ (key * root).mT
        if is_causal:
            attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            weights = weights.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            weights = weights + attn_mask
        weights = torch.where((weights == -torch.inf).all(-1, keepdim=True), 0, weights.softmax(-1))
        return self._dropout(weights, dropout_p) @ value

    def kept(self, like: Tensor, shares: Sequence[float]) -> Tensor:
        """Return False where a group drops, True elsewhere, in the shape of `like`. shares: dropped, by group.

        The first dimension of `like` is the batch, or the batch's rows flattened. A group with a share of 0 draws none.
        """
        made = torch.ones(like.shape, dtype=torch.bool, device=like.device)
        per = len(like) // sum(s.rows for s in self.streams)
        pieces = made.split([s.rows * per for s in self.streams])
        for stream, share, piece in zip(self.streams, shares, pieces, strict=True):
            if share:
                own = self._own(piece, stream, per)
                drawn = torch.empty(own.shape, dtype=torch.bool, device=like.device)
                own.copy_(drawn.bernoulli_(1 - share, generator=stream.generator))
        return made

    def _own(self, piece: Tensor, stream: Stream, per: int) -> Tensor:
        """Return the part of a group's tensor that it would have alone: shorter where its rows are.

        Tokens are the second dimension of three, or the last but one of four, and the last too where they are square.
        """
        if stream.length is None or self.long is None or stream.length == self.long:
            return piece
        if per == self.long and piece.dim() > 1:  # tokens flattened into the rows
            return piece.unflatten(0, (-1, per))[:, : stream.length]
        if piece.dim() == 3 and piece.shape[1] == self.long:
            return piece[:, : stream.length]
        if piece.dim() == 4 and piece.shape[2] == self.long:
            piece = piece[:, :, : stream.length]
            return piece[..., : stream.length] if piece.shape[3] == self.long else piece
        return piece
