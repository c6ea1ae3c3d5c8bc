"""What the adapter that orders images is made of, checked."""

from dataclasses import dataclass
from typing import Literal, get_args

from addenda.core.base.errors import AddendaError

Prompts = Literal["scalar", "vector"]
Pool = Literal["sum", "mean"]


@dataclass(frozen=True)
class OrderSettings:
    """The adapter's shape.

    width: D of all its layers; heads: of every attention; layers: of the cross-modal encoder; after: of the encoder
    behind it. prompts: how many learned tokens stand before the text's, and prompt: of which kind: "scalar", one number
    for all channels, as released, or "vector". pool: how the regression head puts patches together ("sum" as released).
    tokens: M, the relational ones. antisymmetric: s_ij is −s_ji, exactly. mask_padding: the text's padding is not
    attended to (released: it is; only the texts of SigLIP have any here). dropout: behind the cross-modal encoder.
    ratio: how much wider its MLPs are.
    """

    width: int = 384
    heads: int = 8
    layers: int = 2
    after: int = 2
    prompts: int = 32
    prompt: Prompts = "vector"
    pool: Pool = "mean"
    tokens: int = 16
    antisymmetric: bool = True
    mask_padding: bool = True
    dropout: float = 0.1
    ratio: int = 4

    def __post_init__(self):
        counts = {"width": 1, "heads": 1, "layers": 1, "after": 0, "prompts": 0, "tokens": 1, "ratio": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise AddendaError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.width % self.heads:
            raise AddendaError(f"width={self.width} does not divide into heads={self.heads} equal parts.")
        for name, kinds in (("prompt", Prompts), ("pool", Pool)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in get_args(kinds):
                raise AddendaError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}.")
        number = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout < 1:
            raise AddendaError(f"dropout must be at least 0 and below 1, got {self.dropout!r}.")
