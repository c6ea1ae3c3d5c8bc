"""How an image becomes what a model reads: resize, centre crop, rescale, normalise, as the model's folder says.

    how = preparation_of("models/dinov2-small")        # from its preprocessor_config.json
    pixels = how.pixels(PIL.Image.open("cat.jpg"))      # (224, 224, 3) uint8: all that can be computed once and kept
    x = how.tensor(torch.from_numpy(pixels)[None])      # (1, 3, 224, 224) float32: cheap, done for every batch

The steps and their order are those of transformers' image processors, whose results they equal; torchvision is not
needed. What those do beyond these steps (padding, channels in another order, rescaling with an offset) is refused.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.models.pretrained import pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

FILES = ("preprocessor_config.json", "processor_config.json")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where nothing else is said
BILINEAR, BICUBIC = 2, 3  # the first where transformers is told nothing
STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
HARMLESS = {"do_reduce_labels"}  # of maps to segment
WARPED = 384  # with crop_pct: an image of this side or more is not cropped


@dataclass(frozen=True)
class Preparation:
    """resize: (height, width), or the shorter side, or None; crop: (height, width) around the centre, or None.

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
        """(height, width) of every prepared image; None where it depends on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def __str__(self) -> str:
        way = f"shorter side {self.resize}" if isinstance(self.resize, int) else _times(self.resize)
        steps = [f"resized to {way}"] if self.resize else []
        steps += [f"cropped to {_times(self.crop)}"] if self.crop else []
        return ", ".join(steps) or "taken as they are"

    def sized(self, side: int) -> "Preparation":
        """The same for prepared images of side × side pixels: every length in proportion."""
        if side < 1:
            raise AddendaError(f"image_size is the side of a square in pixels, at least 1, got {side}.")
        if self.crop is None or self.resize is None:
            return replace(self, resize=(side, side), crop=None)
        scale = side / min(self.crop)
        scaled = round(self.resize * scale) if isinstance(self.resize, int) else _scaled(self.resize, scale)
        return replace(self, resize=scaled, crop=(side, side))

    def pixels(self, image: "Image") -> np.ndarray:
        """(height, width, channels) uint8: the image in the model's colours, turned upright, resized and cropped.

        Raises ValueError for an image whose range of values is unknown (32 bits, floating point).
        """
        image = _in("RGB" if self.channels == 3 else "L", plain(image))
        if self.resize is not None:
            height, width = self._target(image.height, image.width)
            image = image.resize((width, height), self.resample)
        made = np.asarray(image).reshape(image.height, image.width, self.channels)
        return made if self.crop is None else _cropped(made, *self.crop)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            assert self.resize is not None
            return self.resize
        short, long = min(height, width), max(height, width)
        far = int(self.resize * long / short)
        return (far, self.resize) if height >= width else (self.resize, far)

    def tensor(self, pixels: Tensor) -> Tensor:
        """pixels (B, height, width, channels) uint8 to (B, channels, height, width) float32, normalised."""
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(self.factor)
        if self.mean is not None and self.deviation is not None:
            x.sub_(torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.deviation)[:, None, None])
        return x


def preparation_of(
    folder: str | Path, config: Any = None, image_size: int | None = None, trust_remote_code: bool = False
) -> Preparation:
    """What the folder of a vision model says; without a file for it, the configuration's image size, squeezed into.

    config: the model's configuration. image_size: another side, in pixels. trust_remote_code: run code that the folder
    brings. Raises AddendaError for a file that cannot be read, and for steps that are not done here.
    """
    folder = Path(folder).expanduser()
    said, file = _said(folder, trust_remote_code)
    if said is not None:
        made = _understood(said, file)
    else:
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        made = Preparation((height, width), source=f"no {FILES[0]}: the model's image size, ImageNet's mean")
    channels = getattr(config, "num_channels", None) or 3
    if channels not in (1, 3):
        raise AddendaError(f"The model in {folder} reads {channels} channels; images have 3, or 1 in grey.")
    if made.mean is not None and len(made.mean) != channels:
        mean, deviation = (sum(v or ()) / len(v or (1,)) for v in (made.mean, made.deviation))
        made = replace(made, mean=(mean,) * channels, deviation=(deviation,) * channels)
    made = replace(made, channels=channels)
    return made if image_size is None else made.sized(image_size)


def _said(folder: Path, trust_remote_code: bool) -> tuple[dict | None, Path]:
    """The settings as transformers completes them with its defaults, and the file that holds them."""
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if name != FILES[0] and "image_processor" not in found:
                continue
            made = pretrained("AutoImageProcessor", folder, trust_remote_code=trust_remote_code, backend="pil")
            return made.to_dict(), file
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AddendaError(
                f"{file} does not say how images are prepared: {why} Mend it, or remove it to have images resized to "
                "the model's image size."
            ) from error
    return None, folder / FILES[0]


def _understood(said: dict, file: Path) -> Preparation:
    strange = [k for k, v in said.items() if k.startswith("do_") and v and k not in STEPS | HARMLESS]
    strange += [k for k in ("rescale_offset", "include_top") if said.get(k)]
    size, crop = said.get("size") or {}, said.get("crop_size") or {}
    resize = cut = None
    if said.get("do_resize", True):
        if size.get("height") and size.get("width"):
            resize = (size["height"], size["width"])
        elif size.get("shortest_edge") and not size.get("longest_edge"):
            resize = size["shortest_edge"]
            if said.get("crop_pct") and resize < WARPED:
                cut, resize = (resize, resize), int(resize / said["crop_pct"])
            elif said.get("crop_pct"):
                resize = (resize, resize)
        else:
            strange.append(f"size={size}")
    if said.get("do_center_crop"):
        if crop.get("height") and crop.get("width"):
            cut = (crop["height"], crop["width"])
        else:
            strange.append(f"crop_size={crop}")
    if strange:
        raise AddendaError(
            f"{file} asks for {', '.join(strange)}, which is not done here: images are resized, cropped around their "
            "centre, rescaled and normalised. Prepare them yourself, or change the file."
        )
    normal = said.get("do_normalize", True)
    return Preparation(
        resize,
        cut,
        resample=int(said["resample"]) if said.get("resample") is not None else BILINEAR,
        factor=float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
        mean=_each(said["image_mean"]) if normal else None,
        deviation=_each(said["image_std"]) if normal else None,
        source=file.name,
    )


def _each(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, list | tuple) else (float(values),) * 3


def _scaled(lengths: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(lengths[0] * scale), round(lengths[1] * scale)


def _times(lengths: tuple[int, int] | None) -> str:
    return f"{lengths[0]} × {lengths[1]}" if lengths else ""


def plain(image: "Image") -> "Image":
    """The image upright, in 8 bits: grey (L) where it is grey, else RGB. What is transparent shows its stored colour.

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
    """Around the centre; where the image is smaller, black around it."""
    missing = [max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])]
    if any(missing):
        before = [math.ceil(m / 2) for m in missing]
        around = [(b, m - b) for b, m in zip(before, missing, strict=True)]
        pixels = np.pad(pixels, [*around, (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])
