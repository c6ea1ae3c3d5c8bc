"""How an image becomes what a model reads: resize, centre crop, rescale, normalise, as the model's folder says.

    how = preparation_of("models/dinov2-small")        # from its preprocessor_config.json
    pixels = how.pixels(PIL.Image.open("cat.jpg"))      # (224, 224, 3) uint8: all that can be computed once and kept
    x = how.tensor(torch.from_numpy(pixels)[None])      # (1, 3, 224, 224) float32: cheap, done for every batch

The steps and their order are those of transformers' image processors, whose results they equal; torchvision is not
needed. What those do beyond these steps (padding, channels in another order, rescaling with an offset) is refused.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where nothing else is said
BILINEAR, BICUBIC = 2, 3  # the first where transformers is told nothing


@dataclass(frozen=True)
class Preparation:
    """How images are prepared. resize: (height, width), the shorter side, or None; crop: (height, width) or None.

    Lengths are in pixels. resample: Pillow's number of a filter; factor: what pixels of 0-255 are multiplied by; mean,
    deviation: of each channel after that, or None. channels: 3 (RGB) or 1 (grey). source: where this was said.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None = None
    resample: int = BICUBIC
    factor: float = 1 / 255
    mean: tuple[float, ...] | None = MEAN
    deviation: tuple[float, ...] | None = DEVIATION
    channels: int = 3
    source: str = "defaults"

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) of every prepared image; None where it depends on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def __str__(self) -> str:
        size = f"shorter side {self.resize}" if isinstance(self.resize, int) else _times(self.resize)
        steps = [f"resized to {size}"] if self.resize else []
        steps += [f"cropped to {_times(self.crop)}"] if self.crop else []
        return ", ".join(steps) or "taken as they are"

    def sized(self, side: int) -> "Preparation":
        """Return the same for prepared images of side × side pixels: every length in proportion."""
        if side < 1:
            raise AddendaError(f"image_size is the side of a square in pixels, at least 1, got {side}.")
        if self.crop is None or self.resize is None:
            return replace(self, resize=(side, side), crop=None)
        scale = side / min(self.crop)
        size = round(self.resize * scale) if isinstance(self.resize, int) else _scaled(self.resize, scale)
        return replace(self, resize=size, crop=(side, side))

    def whole(self) -> "Preparation":
        """Return the same with nothing cropped: all of an image is squeezed into the size that was left of it."""
        return self if self.size is None else replace(self, resize=self.size, crop=None)

    def pixels(self, image: "Image") -> np.ndarray:
        """Return (height, width, channels) uint8: the image in the model's colours, upright, resized and cropped.

        Raises ValueError for an image whose range of values is unknown (32 bits, floating point).
        """
        image = _in("RGB" if self.channels == 3 else "L", plain(image))
        if self.resize is not None:
            height, width = self._target(image.height, image.width)
            image = image.resize((width, height), self.resample)
        pixels = np.asarray(image).reshape(image.height, image.width, self.channels)
        return pixels if self.crop is None else _cropped(pixels, *self.crop)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            assert self.resize is not None
            return self.resize
        short, long = min(height, width), max(height, width)
        longer = int(self.resize * long / short)
        return (longer, self.resize) if height >= width else (self.resize, longer)

    def tensor(self, pixels: Tensor) -> Tensor:
        """Return pixels (B, height, width, channels) uint8 as (B, channels, height, width) float32, normalised."""
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(self.factor)
        if self.mean is not None and self.deviation is not None:
            x.sub_(torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.deviation)[:, None, None])
        return x


def _scaled(lengths: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(lengths[0] * scale), round(lengths[1] * scale)


def _times(lengths: tuple[int, int] | None) -> str:
    return f"{lengths[0]} × {lengths[1]}" if lengths else ""


def plain(image: "Image") -> "Image":
    """Return the image upright, in 8 bits: grey (L) where it is grey, else RGB. Transparency is dropped.

    Raises ValueError for an image whose range of values is unknown.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would cut at 255 what reaches to 65,535
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its values are of mode {image.mode!r}, and what is white in them is not known; give it in 8 or 16 bits"
        )
    if image.mode == "P":
        image = image.convert("RGBA")
    return _in("L" if image.mode in ("1", "L", "LA") else "RGB", image)


def _in(mode: str, image: "Image") -> "Image":
    return image if image.mode == mode else image.convert(mode)


def _cropped(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the pixels around the centre; where the image is smaller, with black around it."""
    shortfall = [max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])]
    if any(shortfall):
        margins = [math.ceil(m / 2) for m in shortfall]
        padding = [(b, m - b) for b, m in zip(margins, shortfall, strict=True)]
        pixels = np.pad(pixels, [*padding, (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])
