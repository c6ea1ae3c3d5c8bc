"""What the rows of new tokens start as: what the model has for the pieces of their text, or the mean of all rows."""

from typing import Any

import torch
from torch import Tensor

from addenda.core.base.random import Stream
from addenda.core.file.tokenizer import pieces
from addenda.core.state.vocabulary import axis_of

_PIECE = 1 << 14  # rows that are summed at once


def pieces_of(tokenizer: Any, text: str | None, rows: int) -> list[int]:
    """Return the rows whose mean a token starts as; none for all of them."""
    if text is None:
        return []
    unknown = getattr(tokenizer, "unk_token_id", None)
    return [n for n in pieces(tokenizer, text) if n < rows and n != unknown]


def start_rows(
    table: Tensor, rows: int, texts: list[str | None], parts: list[list[int]], noise: float, stream: Stream
) -> Tensor:
    """Return new rows of a table, one for each text, in its dtype and on its device."""
    axis = axis_of(table, rows) or 0
    values = table.detach().movedim(axis, 0)
    mean = _mean(values)
    made = [values[p].double().mean(0) if p else mean for p in parts]
    if noise:
        spread = float(torch.linalg.vector_norm(values, dtype=torch.float32)) / values.numel() ** 0.5
        made = [
            row + stream.fork(f"{rows + i}\x1f{t}").normal(*row.shape, std=noise * spread).to(row)
            for i, (row, t) in enumerate(zip(made, texts, strict=True))
        ]
    return torch.stack(made).to(table.dtype).movedim(0, axis)


def _mean(values: Tensor) -> Tensor:
    """Return the mean of rows in float64, summed piece by piece: no copy of a table is made."""
    return torch.stack([piece.double().sum(0) for piece in values.split(_PIECE)]).sum(0) / len(values)
