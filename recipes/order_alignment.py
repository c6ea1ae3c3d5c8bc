"""A small alignment of both encoders, trained on tiles with a class name: a baseline of `recipes.order`.

Not zero-shot, and no CLIP: it has seen every class by name, on tiles; what it has never seen is a count. One linear map
takes a pooled patch to the width of the texts; it learns which of ten names, or "an empty place", a patch is (cross
entropy of cosines over a temperature that is learned). A mosaic's score for a sentence is how many of its places take
the sentence rather than one of the names: Σ_p exp(l_q) / (exp(l_q) + Σ_names exp(l)).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.random import Stream

RATE, STEPS, BATCH = 3e-3, 300, 64


class Alignment:
    """A map from patch states to the width of texts. names: unit vectors of the names, K × E, of nothing the last."""

    def __init__(self, image_width: int, names: Tensor, seed: int):
        self.names = names
        self.map = nn.Linear(image_width, names.shape[1])
        self.sharp = nn.Parameter(torch.tensor(3.0))  # its exponential: 20
        self.norm = nn.LayerNorm(image_width, elementwise_affine=False)
        with torch.no_grad():
            self.map.weight.copy_(Stream(seed, "alignment").normal(*self.map.weight.shape, std=image_width**-0.5))
            self.map.bias.zero_()

    def logits(self, patches: Tensor, texts: Tensor) -> Tensor:
        """Return … × K of patches … × D, by unit vectors K × E."""
        return self.sharp.exp() * (F.normalize(self.map(self.norm(patches)), dim=-1) @ texts.t())

    @torch.no_grad()
    def scores(self, patches: Tensor, text: Tensor) -> np.ndarray:
        """Return the scores, N, of N × P × D by one sentence's unit vector."""
        logits = self.logits(patches, torch.cat([text[None], self.names]))
        return logits.softmax(-1)[..., 0].sum(1).double().numpy()


def aligned(
    patches: Sequence[Tensor], classes: np.ndarray, names: Tensor, seed: int, tick: Callable[[], None] = lambda: None
) -> Alignment:
    """Train on mosaics of one tile. patches: of each, P × D, as many as places; classes: N × P, −1 for a blank."""
    made = Alignment(patches[0].shape[1], names, seed)
    stacked = torch.stack(list(patches))
    where = torch.from_numpy(classes >= 0)
    tiles, of = stacked[where], torch.from_numpy(classes)[where]
    free = [torch.nonzero(~at).flatten() for at in where]
    blank = torch.stack([stacked[i, at[i % len(at)]] for i, at in enumerate(free)])  # of all places, not one corner
    optimizer = torch.optim.AdamW([*made.map.parameters(), made.sharp], lr=RATE, weight_decay=0.01)
    for step in range(STEPS):
        tick()
        at = Stream(seed, "aligned", str(step)).choice(len(tiles), min(BATCH, len(tiles)))
        some = at[: max(1, len(at) // len(names))]  # as many blanks as tiles of a class
        x = torch.cat([tiles[at], blank[some]])
        target = torch.cat([of[at], torch.full((len(some),), len(names) - 1)])
        F.cross_entropy(made.logits(x, names), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return made
