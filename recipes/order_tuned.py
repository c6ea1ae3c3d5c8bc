"""The image encoder itself trained, whole or by LoRA, under a regression head: a baseline of `recipes.order`.

The head has one output for each trained query over the mean of the patch states, so a step teaches all queries of its
images, and there is no text: it answers what it was trained on. Loss, schedule and weight decay are the adapter's.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.adapter.attach import attach
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.ranking.order.towers import Towers
from addenda.train.settings import Settings

Score = Callable[[np.ndarray], np.ndarray]


class Tuned(nn.Module):
    """An encoder and a linear head over the mean of its patch states. lora: an adapter's text form; "": all trains."""

    def __init__(self, towers: Towers, queries: int, lora: str, seed: int):
        super().__init__()
        self.encoder, self.preparation = copy.deepcopy(towers.image), towers.preparation
        self.encoder.requires_grad_(True)
        if lora:
            attach(self.encoder, lora, seed=seed)
        self.head = nn.Linear(towers.image_width, queries)
        with torch.no_grad():
            width = towers.image_width
            self.head.weight.copy_(Stream(seed, "head").normal(queries, width, std=width**-0.5))
            self.head.bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return B × Q of prepared pixels, B × H × W × C uint8."""
        states = self.encoder(pixel_values=self.preparation.tensor(pixels)).last_hidden_state
        return self.head(states[:, 1:].mean(1))


def tuned(
    towers: Towers, pixels: np.ndarray, y: np.ndarray, *, lora: str = "", steps: int, batch: int, rate: float,
    head_rate: float, seed: int, tick: Callable[[], None] = lambda: None,
) -> Score:  # fmt: skip
    """Train and return what scores prepared pixels, N × H × W × C uint8, N × Q. y: N × Q, in units of the query."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = Tuned(towers, y.shape[1], lora, seed).train()
        learned = [p for p in net.encoder.parameters() if p.requires_grad]
        groups = [{"params": learned, "lr": rate}, {"params": list(net.head.parameters()), "lr": head_rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        schedule = Settings(steps=steps, rate=rate, schedule="cosine", warmup=0.1).multiplier()
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        for step in range(steps):
            tick()
            at = Stream(seed, "tuned", str(step)).choice(len(pixels), min(batch, len(pixels))).numpy()
            loss = torch.log1p(F.smooth_l1_loss(net(torch.from_numpy(pixels[at])), torch.from_numpy(y[at]).float()))
            if not math.isfinite(value := float(loss.detach())):
                raise AddendaError(f"The loss is {value} at step {step + 1} with rate {rate:g}: the run has diverged.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)
    net.eval()

    @torch.no_grad()
    def score(images: np.ndarray) -> np.ndarray:
        return torch.cat([net(part) for part in torch.from_numpy(images).split(batch)]).double().numpy()

    return score
