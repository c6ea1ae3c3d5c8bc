"""What the image encoder gives for each image, kept on disk: a second sentence costs no second look at the images.

A file holds the patches of one image, under the SHA-256 of the image's bytes, in a folder that is named after all that
decides its numbers: the encoder's weights, how images are prepared, the grid. So an image that is moved or renamed is
known again, and another encoder finds nothing. Damaged files are made anew; where nothing can be written nothing is
kept. What was unused the longest goes first when there is more than `ROOM`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.disk.cache import cache_folder
from addenda.core.file.identity import digest, versions
from addenda.core.file.states import read_state, write_state
from addenda.data.examples import Picture
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
            if (kept := self._kept(picture.key)) is not None:
                yield i, kept
            else:
                missing.append(i)
        waiting: list[tuple[int, np.ndarray]] = []
        for i in missing:
            pixels = _decoded(pictures[i], self.towers)
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
            trim(self.folder.parent)

    def _read(
        self, waiting: Sequence[tuple[int, np.ndarray]], pictures: Sequence[Picture]
    ) -> Iterator[tuple[int, Tensor]]:
        pixels = np.stack([p for _, p in waiting])
        filled = np.concatenate([pixels, np.repeat(pixels[:1], BATCH - len(pixels), 0)])
        states = self.towers.patches(self.towers.preparation.tensor(torch.from_numpy(filled)))
        for (i, _), patches in zip(waiting, states, strict=False):
            self.made += 1
            self._keep(pictures[i].key, patches)
            yield i, patches.clone()

    def _kept(self, key: str) -> Tensor | None:
        file = self.folder / f"{key}.safetensors"
        if not self.cache or not file.is_file():
            return None
        try:
            patches = read_state(file)["patches"]
            fine = patches.dim() == 2 and patches.shape[1] == self.towers.image_width and bool(patches.isfinite().all())
        except (AddendaError, KeyError, TypeError, AttributeError):
            fine, patches = False, None
        with suppress(OSError):
            os.utime(file) if fine else file.unlink()
        return patches if fine else None

    def _keep(self, key: str, patches: Tensor) -> None:
        if self.cache:
            with suppress(OSError):
                write_state(self.folder / f"{key}.safetensors", {"patches": patches.clone()}, "patches of an image")


def trim(folder: Path, room: int = ROOM) -> None:
    """Remove the files below a folder that were unused the longest, until the rest fits."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("*/*.safetensors"):
        with suppress(OSError):
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found, key=lambda f: f[0]):
        if total <= room:
            break
        with suppress(OSError):
            path.unlink()
            total -= size


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


def _decoded(picture: Picture, towers: Towers) -> np.ndarray | str:
    try:
        return towers.preparation.pixels(picture.open())
    except ImportError as error:
        raise AddendaError(f'Images are decoded by Pillow: {error}. Run `pip install "addenda[vision]"`.') from None
    except Exception as error:  # decoders raise whatever their formats lead them to
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_decoded(problems: dict[str, str], images: int, where: str) -> None:
    """Raise AddendaError where some of so many images could not be decoded, by name."""
    if problems:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(problems.items())[:5])
        rest = f"; … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AddendaError(
            f"{len(problems)} of {images} images of {where} cannot be decoded: {reasons}{rest}. Mend or "
            "remove them, or leave them out with skip_corrupt (--skip-corrupt)."
        )
