"""LoReFT: an edit of the hidden states inside a low-rank subspace (Wu et al. 2024, arXiv 2404.03592).

    h' = h + Rᵀ (W h + b − R h)      R: r × d with orthonormal rows, W: r × d, b: r

The part of h in the subspace that R spans is replaced by W h + b. W is trained as an offset from R, W = R + dW, so

    h' = h + Rᵀ (dW h + b)

which is the same set of functions, starts exactly at the base (dW = 0, b = 0) and needs one product less. R is the
orthonormal factor of a trained r × d matrix, by a QR decomposition in float32 each forward, with the signs of
Gram-Schmidt: a decomposition leaves them open, and a row that turned around between two steps would turn its edit too.

Where: what every block returns, or targets= for some of them: the paper edits a few layers. first, last: only so many
tokens at the start and the end of the sequence; 0 and 0 for all. Tokens are counted in each example, what the attention
mask leaves out is none (`core.state.cache_length`), and behind a cache `first` goes on from there. Trap: a sequence
ends where what the block is given ends, so with a cache each new token is a last one, and those before it stay edited;
without one only the newest are. With last > 0 generate as you have trained.

Cost: 2 r d + r numbers a place, two thin products a token, and the QR of an r × d matrix a forward.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.core.method.hidden import HiddenMethod


@register(
    "loreft",
    title="LoReFT",
    paper="Wu et al. 2024, arXiv:2404.03592",
    equation="h' = h + Rᵀ (W h + b − R h), R Rᵀ = I",
    hypothesis="A concept lives in a linear subspace of the hidden states; setting h there steers the model.",
    family="hidden",
    rate=1e-3,
    paper_setting="LLaMA: r = 8 on all layers, as here, at the first and the last 7 places of a prompt "
    "(first=7,last=7; here every place), rate 9e-4; RoBERTa: r = 1 at the first place, chat: r = 4 on 4 layers and 5 "
    "+ 5 places (release's commands).",
)
@dataclass(frozen=True)
class LoReFT(HiddenMethod):
    """rank: r. first, last: how many tokens at the start and the end are edited; both 0: all."""

    sized_by: ClassVar[str] = "rank"
    targets: ClassVar[str] = "block"
    rank: int = 8
    first: int = 0
    last: int = 0
    masked: ClassVar[bool] = True

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.first > 0 or self.last > 0

    def validate(self):
        if self.rank < 1:
            yield f"rank must be at least 1, got {self.rank}"
        if self.first < 0 or self.last < 0:
            yield f"first and last must be at least 0, got {self.first} and {self.last}"

    def check(self, width: int) -> str | None:
        return f"{self.rank} orthonormal rows do not fit into {width} dimensions" if self.rank > width else None

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        own = {"basis": rng.normal(self.rank, width), "offset": torch.zeros(self.rank, width)}
        return {k: nn.Parameter(t) for k, t in (own | {"bias": torch.zeros(self.rank)}).items()}

    def _rows(self, p: Params) -> Tensor:
        """R: r × d, orthonormal rows."""
        wide = torch.promote_types(p["basis"].dtype, torch.float32)
        Q, R = torch.linalg.qr(p["basis"].to(wide).t())
        return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)).t()

    def _edit(self, h: Tensor, p: Params) -> Tensor:
        change = F.linear(h, p["offset"].to(h.dtype), p["bias"].to(h.dtype))
        return F.linear(change, self._rows(p).t().to(h.dtype))

    def change(
        self,
        x: Tensor,
        y: Tensor,
        p: Params,
        training: bool = False,
        past: int | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if not (self.first or self.last):
            return y + self._edit(x, p).to(y.dtype)
        length = x.shape[-2]
        if mask is not None or isinstance(past, Tensor):
            return y + torch.where(self._edited(length, past, mask, x), self._edit(x, p), 0).to(y.dtype)
        first = min(max(self.first - (past or 0), 0), length)
        last = min(self.last, length - first)
        parts = [self._edit(x[..., :first, :], p), torch.zeros_like(x[..., first : length - last, :]),
                 self._edit(x[..., length - last :, :], p)]  # fmt: skip
        return y + torch.cat(parts, -2).to(y.dtype)

    def _edited(self, length: int, past: int | Tensor | None, mask: Tensor | None, x: Tensor) -> Tensor:
        """Which tokens: (batch, tokens, 1), or (tokens, 1) for all examples."""
        if mask is None:
            mask = torch.ones(length, dtype=torch.bool, device=x.device)
        number = mask.cumsum(-1)
        first = (0 if past is None else past) + number <= self.first
        return (mask & (first | (number > number[..., -1:] - self.last)))[..., None]

    def trainable(self, width: int) -> int:
        return 2 * self.rank * width + self.rank
