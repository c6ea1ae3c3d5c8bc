"""How a vision model's folder wants its images prepared, read from its preprocessor_config.json."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.data.prepare import BILINEAR, Preparation
from addenda.models.pretrained import pretrained

FILES = ("preprocessor_config.json", "processor_config.json")


STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


HARMLESS = {"do_reduce_labels"}  # of maps to segment


WARPED = 384  # with crop_pct: an image of this side or more is not cropped


def preparation_of(
    folder: str | Path, config: Any = None, image_size: int | None = None, trust_remote_code: bool = False
) -> Preparation:
    """Return how the folder of a vision model prepares images; else a resize to the configuration's image size.

    config: the model's configuration. image_size: another side, in pixels. trust_remote_code: run code that the folder
    brings. Raises AddendaError for a file that cannot be read, and for steps that are not done here.
    """
    folder = Path(folder).expanduser()
    settings, file = _said(folder, trust_remote_code)
    if settings is not None:
        preparation = _understood(settings, file)
    else:
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        preparation = Preparation((height, width), source=f"no {FILES[0]}: the model's image size, ImageNet's mean")
    channels = getattr(config, "num_channels", None) or 3
    if channels not in (1, 3):
        raise AddendaError(f"The model in {folder} reads {channels} channels; images have 3, or 1 in grey.")
    if preparation.mean is not None and len(preparation.mean) != channels:
        mean, deviation = (sum(v or ()) / len(v or (1,)) for v in (preparation.mean, preparation.deviation))
        preparation = replace(preparation, mean=(mean,) * channels, deviation=(deviation,) * channels)
    preparation = replace(preparation, channels=channels)
    return preparation if image_size is None else preparation.sized(image_size)


def _said(folder: Path, trust_remote_code: bool) -> tuple[dict | None, Path]:
    """Return the settings as transformers completes them with its defaults, and the file that holds them."""
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
            if name != FILES[0] and "image_processor" not in entries:
                continue
            processor = pretrained("AutoImageProcessor", folder, trust_remote_code=trust_remote_code, backend="pil")
            return processor.to_dict(), file
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AddendaError(
                f"{file} does not say how images are prepared: {cause} Mend it, or remove it to have images resized to "
                "the model's image size."
            ) from error
    return None, folder / FILES[0]


def _understood(said: dict, file: Path) -> Preparation:
    steps = [k for k, v in said.items() if k.startswith("do_") and v and k not in STEPS | HARMLESS]
    steps += [k for k in ("rescale_offset", "include_top") if said.get(k)]
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
            steps.append(f"size={size}")
    if said.get("do_center_crop"):
        if crop.get("height") and crop.get("width"):
            cut = (crop["height"], crop["width"])
        else:
            steps.append(f"crop_size={crop}")
    if steps:
        raise AddendaError(
            f"{file} asks for {', '.join(steps)}, which is not done here: images are resized, cropped around their "
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
