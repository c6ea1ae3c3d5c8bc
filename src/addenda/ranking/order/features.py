"""What the image encoder gives for each image, kept on disk: a second sentence costs no second look at the images.

A file holds the patches of one image, under the SHA-256 of the image's bytes, in a folder that is named after all that
decides its numbers: the encoder's weights, how images are prepared, the grid. So an image that is moved or renamed is
known again, and another encoder finds nothing. Damaged files are made anew; where nothing can be written nothing is
kept. What was unused the longest goes first when there is more than `ROOM`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from addenda.core.disk.cache import cache_folder, trim
from addenda.core.file.identity import digest, versions
from addenda.core.file.states import keep, kept
from addenda.data.examples import Picture
from addenda.data.pixels import looked_at
from addenda.ranking.order.towers import Towers

ROOM = 4 << 30  # bytes that are kept, of all encoders together
BATCH = 16  # images read at once; every batch is filled up to it, so that an image's bits depend on no other


@dataclass
class Features:
    """Patches of images by the SHA-256 of their bytes. cache: are they kept on disk? made: how many were new."""

    towers: Towers
    cache: bool = True
    made: int = 0

    def __post_init__(self):
        identity = {k: v for k, v in self.towers.identity.items() if k not in ("text", "tokenizer", "filled")}
        self.folder = cache_folder() / "patches" / digest([identity, versions()])[:24]

    def of(self, pictures: Sequence[Picture]) -> Iterator[tuple[int, Tensor | str]]:
        """Yield (position, patches P × D_i), or why an image cannot be decoded, of every picture, in no order."""
        missing: list[int] = []
        for i, picture in enumerate(pictures):
            if (known := self._kept(picture.key)) is not None:
                yield i, known
            else:
                missing.append(i)
        waiting: list[tuple[int, np.ndarray]] = []
        decoded = looked_at([pictures[i] for i in missing], self.towers.preparation)
        for i, pixels in zip(missing, decoded, strict=True):
            if isinstance(pixels, str):
                yield i, pixels
                continue
            waiting.append((i, pixels))
            if len(waiting) == BATCH:
                yield from self._read(waiting, pictures)
                waiting = []
        if waiting:
            yield from self._read(waiting, pictures)
        if missing and self.cache:
            trim(self.folder.parent, ROOM)

    def _read(
        self, waiting: Sequence[tuple[int, np.ndarray]], pictures: Sequence[Picture]
    ) -> Iterator[tuple[int, Tensor]]:
        pixels = np.stack([p for _, p in waiting])
        filled = np.concatenate([pixels, np.repeat(pixels[:1], BATCH - len(pixels), 0)])
        states = self.towers.patches(self.towers.preparation.tensor(torch.from_numpy(filled)))
        for (i, _), patches in zip(waiting, states, strict=False):
            self.made += 1
            if self.cache:
                keep(
                    self.folder / f"{pictures[i].key}.safetensors", {"patches": patches.clone()}, "patches of an image"
                )
            yield i, patches.clone()

    def _kept(self, key: str) -> Tensor | None:
        if not self.cache:
            return None
        known = kept(self._file(key), self._sound)
        return None if known is None else known["patches"]

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _sound(self, state: Any) -> bool:
        patches = state["patches"]
        return patches.dim() == 2 and patches.shape[1] == self.towers.image_width and bool(patches.isfinite().all())


def all_of(features: Features, pictures: Sequence[Picture]) -> tuple[list[Tensor | None], dict[str, str]]:
    """Return the patches of every picture, None for one that cannot be decoded, and why, by its name."""
    found: list[Tensor | None] = [None] * len(pictures)
    problems: dict[str, str] = {}
    for i, made in features.of(pictures):
        if isinstance(made, str):
            problems[pictures[i].name] = made
        else:
            found[i] = made
    return found, problems
