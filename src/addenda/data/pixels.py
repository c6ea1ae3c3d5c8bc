"""Images as pixels: decoded when a batch wants them, by a few threads; kept as bytes where they fit.

Reading, decoding and resizing take longer than a small model's step, so the prepared pixels (uint8, before they are
normalised) are kept up to `KEPT` bytes: at 224 × 224 pixels the first 7,000 images. They are decoded when the data is
made, not in the first epoch: so a corrupt file is found before training, and a run's memory is its own. What does not
fit is decoded again for every batch, and the next batch while the model works on this one.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.data.encoded import Encoded, Kind
from addenda.data.examples import Data, Picture
from addenda.data.images import pool
from addenda.data.prepare import Preparation

KEPT = 1 << 30  # bytes of one data set
WINDOW = 64  # images on their way through the threads while all are looked at


@dataclass(frozen=True, eq=False)
class Images(Encoded):
    """Pictures that were looked at once. kept: prepared pixels by `Picture.key`; skipped: names of corrupt files."""

    unit: ClassVar[str] = "images"
    ragged: ClassVar[bool] = False
    pictures: tuple[Picture, ...]
    labels: list[int]
    how: Preparation
    names: tuple[str, ...] | None
    kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    said: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    kind: Kind = "class"
    coming: dict[int, Future] = field(default_factory=dict, repr=False)  # by position

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: t[0] for k, t in self.batch([i]).items()}

    @cached_property
    def lengths(self) -> list[int]:
        """One each: the images of a set are alike."""
        return [1] * len(self.pictures)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the stored images, their labels and how they are prepared."""
        digest = hashlib.sha256(repr(replace(self.how, source="")).encode())
        for picture in self.pictures:
            digest.update(f"{picture.key}{picture.label}".encode())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "Images":
        pictures = tuple(self.pictures[i] for i in rows)
        return replace(self, pictures=pictures, labels=[p.label for p in pictures], coming={})

    def batch(self, rows: Sequence[int], skip: int = 0) -> dict[str, Tensor]:
        """Return pixel_values (B × channels × height × width) float32, and labels (B)."""
        pixels = torch.from_numpy(np.stack(list(self._pixels(rows))))
        return {"pixel_values": self.how.tensor(pixels), "labels": torch.tensor([self.labels[i] for i in rows])}

    def ahead(self, rows: Sequence[int]) -> None:
        for future in self.coming.values():
            future.cancel()
        self.coming.clear()
        self.coming.update({i: pool().submit(_decoded, self.pictures[i], self.how) for i in self._lacking(rows)})

    def _lacking(self, rows: Iterable[int]) -> list[int]:
        return [i for i in dict.fromkeys(rows) if self.pictures[i].key not in self.kept]

    def _pixels(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        coming = {i: self.coming.pop(i, None) for i in self._lacking(rows)}
        futures = {i: f or pool().submit(_decoded, self.pictures[i], self.how) for i, f in coming.items()}
        for i in rows:
            yield futures[i].result() if i in futures else self.kept[self.pictures[i].key]


def decode(data: Data, how: Preparation, *, skip_corrupt: bool = False, keep: int | None = None) -> Images:
    """Look at every image of the data once, and keep the prepared pixels of as many as fit.

    keep: bytes (default `KEPT`). skip_corrupt: leave out what cannot be decoded, and name it in `skipped`.
    Raises AddendaError for files that cannot be decoded, all of them by name, and for images of different sizes that
    the preparation leaves so.
    """
    pictures: list[Picture] = list(data.examples)  # type: ignore[arg-type]
    room, stored, sound = KEPT if keep is None else keep, {}, []
    problems: dict[str, str] = {}
    shape, first_name = None, ""
    for picture, result in zip(pictures, _seen(pictures, how, room), strict=True):
        if isinstance(result, str):
            problems[picture.name] = result
            continue
        if result is not None:
            shape, first_name = shape or result.shape, first_name or picture.name
            if result.shape != shape:
                raise AddendaError(
                    f"{picture.name} in {data.source} is {_size(result.shape)} pixels and {first_name} is "
                    f"{_size(shape)}: one batch cannot hold both, and the model's folder has images {how}. "
                    "Give image_size, in pixels."
                )
            if result.nbytes <= room and picture.key not in stored:
                stored[picture.key] = result
                room -= result.nbytes
        sound.append(picture)
    if not skip_corrupt:
        check_decoded(problems, len(pictures), data.source)
    if not sound:
        raise AddendaError(f"None of the {len(pictures)} images of {data.source} can be decoded.")
    notes = (data.said,) if data.said else ()
    return Images(tuple(sound), [p.label for p in sound], how, data.labels, stored, notes, tuple(problems))


def check_decoded(problems: Mapping[str, str], count: int, where: str) -> None:
    """Raise AddendaError where some of so many images could not be decoded. problems: why, by name."""
    if problems:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(problems.items())[:5])
        rest = f"; … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AddendaError(
            f"{len(problems)} of {count} images of {where} cannot be decoded: {reasons}{rest}. Mend or "
            "remove them, or leave them out with skip_corrupt (--skip-corrupt)."
        )


def looked_at(pictures: Iterable[Picture], how: Preparation) -> Iterator[np.ndarray | str]:
    """Yield each picture's pixels, or why there are none, in order; a few threads decode those that come next."""
    futures: list[Future] = []
    for picture in pictures:
        futures.append(pool().submit(_tried, picture, how))
        if len(futures) > WINDOW:
            yield futures.pop(0).result()
    for future in futures:
        yield future.result()


def _seen(pictures: Sequence[Picture], how: Preparation, keep: int) -> Iterator[np.ndarray | str | None]:
    """Yield what `looked_at` does, and None for pixels that are in memory, sound, and would not be kept."""
    size = how.size
    room = len(pictures) if size is None else keep // (size[0] * size[1] * how.channels)
    sure = [isinstance(p.stored, np.ndarray) and size is not None and i >= room for i, p in enumerate(pictures)]
    found = looked_at((p for p, known in zip(pictures, sure, strict=True) if not known), how)
    for known in sure:
        yield None if known else next(found)


def _decoded(picture: Picture, how: Preparation) -> np.ndarray:
    return how.pixels(picture.open())


def _tried(picture: Picture, how: Preparation) -> np.ndarray | str:
    try:
        return _decoded(picture, how)
    except ImportError as error:
        raise AddendaError(f'Images are decoded by Pillow: {error}. Run `pip install "addenda[vision]"`.') from None
    except Exception as error:  # decoders raise whatever their formats lead them to
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} × {shape[1]}"
