"""The bases that the golden files were written on. Frozen: a change here makes every file below unreadable."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, INNER, VOCAB = 64, 128, 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).transpose(-1, -2) / WIDTH**0.5
        return self.o_proj(scores.softmax(-1) @ self.v_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Layers(nn.Module):
    """Embedding, one transformer block in a ModuleList, a head: (batch, time) of ids to (batch, time, 3)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block()])
        self.score = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


class Growing(Layers):
    """`Layers` that says where its table of tokens is."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed


class Twins(Layers):
    """`Layers` whose value and output have the same weight, so that a change of one fits the other too."""


class Kinds(nn.Module):
    """Every kind of site, small: (batch, time) of ids to (batch, time, 8)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8, padding_idx=3)
        self.linear = nn.Linear(8, 16)
        self.conv1d = Conv1D(8, 16)
        self.line = nn.Conv1d(8, 8, 3, padding=1, groups=2, bias=False)
        self.plane = nn.Conv2d(8, 8, 2, padding=1, padding_mode="circular")
        self.volume = nn.Conv3d(8, 8, (1, 2, 1))
        self.matrix = nn.Parameter(torch.empty(8, 8))
        self.experts = nn.Parameter(torch.empty(2, 8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv1d(torch.tanh(self.linear(x)))
        x = x + self.line(x.mT).mT
        x = x + self.plane(x.mT[..., None]).mean(-1)[..., :-1].mT
        x = x + self.volume(torch.stack([x.mT, -x.mT], -1)[..., None]).flatten(2).mT
        x = x + x @ self.matrix
        return x + torch.stack([x @ expert for expert in self.experts]).tanh().sum(0)
