"""The adapter: from an image's patches and a sentence's tokens to a score, and while training to who ranks higher.

    Z patches (N × P × D_i), W tokens (T × D_t) -> the adapter's width D
    cross-modal encoder, `layers` times:        Z ← Z + Attn(Z), + MLP(Z), + Attn(Z; [prompts; W]), + MLP(Z)
    X = Encoder(LN(Z) P), `after` layers        norm behind, ReLU, as released
    ŷ_i = MLP(Σ_p LN(X_ip))                     the regression head, all that ranking uses (pool="mean": divided by P)
    s_ij                                        the relational head (`pair_head`), which training uses besides

The prompts stand before the text's own states, on the output side of its encoder, as released. P is left
uninitialised there; here it begins as the identity. Facts: arXiv 2412.06760 and its released code.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.ranking.order.pair_head import PairHead, scorer
from addenda.ranking.order.settings import OrderSettings


class Scores(NamedTuple):
    """Of N images: values (N), and pairs (N × N), s_ij above 0 where i ranks above j; None where not asked for."""

    values: Tensor
    pairs: Tensor | None


class OrderAdapter(nn.Module):
    """Scores of images by a sentence from the states of two frozen encoders.

    image_width, text_width: D_i and D_t of the encoders. seed: of the values that it begins with, alike everywhere;
    begin: False leaves them as torch makes them, for whoever puts others in.
    """

    def __init__(self, settings: OrderSettings, image_width: int, text_width: int, seed: int = 0, begin: bool = True):
        super().__init__()
        self.settings = s = settings
        self.from_image, self.from_text = nn.Linear(image_width, s.width), nn.Linear(text_width, s.width)
        self.prompts = nn.Parameter(torch.zeros(s.prompts, 1 if s.prompt == "scalar" else s.width))
        self.blocks = nn.ModuleList(
            Block(s.width, s.heads, s.ratio, across) for _ in range(s.layers) for across in (False, True)
        )
        self.norm, self.projection = nn.LayerNorm(s.width), nn.Linear(s.width, s.width, bias=False)
        self.after = nn.ModuleList(
            nn.TransformerEncoderLayer(s.width, s.heads, s.width, s.dropout, batch_first=True) for _ in range(s.after)
        )
        self.pooled_norm, self.score = nn.LayerNorm(s.width), scorer(s.width, depth=2)
        self.pair_head = PairHead(s.width, s.heads, s.tokens, s.antisymmetric)
        if begin:
            self._begin(seed)

    def forward(self, patches: Tensor, tokens: Tensor, mask: Tensor | None = None, pairs: bool = False) -> Scores:
        """Return the scores of N images by one sentence.

        patches: N × P × D_i; tokens: T × D_t; mask: T, true where a token is none of the padding. pairs: with s_ij.
        """
        states = self.states(patches, tokens, mask)
        return Scores(self.values(states), self.pair_head(states) if pairs else None)

    def states(self, patches: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return X, N × P × D: what both heads read."""
        s = self.settings
        if patches.dim() != 3 or tokens.dim() != 2:
            raise AddendaError(
                f"Expected patches as images × patches × width and the tokens of one sentence as tokens × width, got "
                f"shapes {tuple(patches.shape)} and {tuple(tokens.shape)}."
            )
        context = torch.cat([self.prompts.expand(-1, s.width), self.from_text(tokens)])
        if mask is not None and s.mask_padding:
            mask = F.pad(mask.bool(), (s.prompts, 0), value=True)
            context = context[mask]  # one sentence: what is masked is simply not there
        states = self.from_image(patches)
        for own, across in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            states = across(own(states), context)
        states = self.projection(self.norm(states))
        for layer in self.after:
            states = layer(states)
        return states

    def values(self, states: Tensor) -> Tensor:
        """Return ŷ, N, of states N × P × D."""
        normed = self.pooled_norm(states)
        pooled = normed.sum(1) if self.settings.pool == "sum" else normed.mean(1)
        return self.score(pooled).squeeze(-1)

    @torch.no_grad()
    def _begin(self, seed: int) -> None:
        """Set every tensor to what it begins with: Xavier for matrices, 0 for biases, 1 for gains."""
        for name, p in self.named_parameters():
            rng = Stream(seed, "order", name)
            if name == "projection.weight":
                p.copy_(torch.eye(len(p)))
            elif name in ("prompts", "pair_head.tokens"):
                p.copy_(rng.normal(*p.shape) * self.settings.width**-0.5)
            elif p.dim() == 2:
                bound = math.sqrt(6 / sum(p.shape))
                p.copy_(rng.uniform(*p.shape, low=-bound, high=bound))
            else:
                p.zero_()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm, beside a residual; among the states, or across to a context."""

    def __init__(self, width: int, heads: int, ratio: int, across: bool):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width) if across else None
        self.query, self.key_value, self.out = (nn.Linear(width, n) for n in (width, 2 * width, width))
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, states: Tensor, context: Tensor | None = None) -> Tensor:
        """Return new states, N × P × D. context: T × D of one sentence for all images, of a block that looks across."""
        normed = read = self.norm(states)
        query = self.query(normed)
        if self.context_norm is not None:  # all patches of all images ask the same few tokens: one product, not N
            assert context is not None
            query, read = query.flatten(0, 1), self.context_norm(context)
        key, value = self.key_value(read).chunk(2, -1)
        attended = F.scaled_dot_product_attention(self._split(query), self._split(key), self._split(value))
        states = states + self.out(attended.transpose(-3, -2).flatten(-2).view_as(states))
        return states + self.mlp(self.mlp_norm(states))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
