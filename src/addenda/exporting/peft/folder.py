"""A folder of PEFT: `adapter_config.json` and `adapter_model.safetensors`, checked for form before anything is done.

A key is "base_model.model." + the module's path + "." + the name of a tensor there; what all sites share stands under
"base_model." The adapter's name is in no key. Only safetensors are read: a pickle can run code.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, read_json, reading, shown
from addenda.core.disk.atomic import write_atomically
from addenda.core.file.container import sound
from addenda.core.file.header import FLOATING

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, ROOT = "base_model.model.", "base_model."
_MOST = 1 << 22  # bytes of a config
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass
class PeftFolder:
    """What a folder holds. tensors: by full key, as stored."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def type(self) -> str:
        """PEFT's name of the method, "LORA"."""
        return str(self.config["peft_type"])


def read_folder(path: str | Path) -> PeftFolder:
    """Return what a folder of PEFT holds, or that of one of its two files.

    Raises AddendaError where a file is missing or damaged, where there are only pickles, and for a config that is none.
    """
    path = path_of(path)
    folder = path.parent if path.is_file() else path
    with reading(folder):
        has_config, has_weights = (folder / CONFIG).is_file(), (folder / WEIGHTS).is_file()
        pickles = [p.name for p in sorted(folder.glob("adapter_model*")) if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        size = (folder / CONFIG).stat().st_size if has_config else 0
    if not has_config:
        raise AddendaError(
            f"{shown(path)} is an adapter of PEFT without its {CONFIG}, which says how it acts. Keep the folder that "
            "PEFT's save_pretrained has written together."
            if folder != path
            else f"{shown(folder)} has no {CONFIG}, so it is no adapter folder of PEFT. Give the folder that PEFT's "
            "save_pretrained has written."
        )
    if not has_weights:
        if pickles:
            raise AddendaError(
                f"{shown(folder)} holds its weights as {pickles[0]} only, a pickle, which can run code and is never "
                "opened. Where you trust it, load it with PEFT and save it again: "
                "PeftModel.from_pretrained(base, folder).save_pretrained(new, safe_serialization=True)."
            )
        raise AddendaError(
            f"{shown(folder)} has no {WEIGHTS}. Give the folder that PEFT's save_pretrained has written."
        )
    if size > _MOST:
        raise AddendaError(f"{shown(folder / CONFIG)} has {size:,} bytes, which no config of PEFT has.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AddendaError(f"{shown(folder / CONFIG)} is no config of PEFT: it names no peft_type.")
    return PeftFolder(folder, config, _tensors(folder / WEIGHTS))


def _tensors(file: Path) -> dict[str, Tensor]:
    with sound(file) as opened:
        tensors = opened.tensors()
    problems = [f"{k} is {str(t.dtype).removeprefix('torch.')}" for k, t in tensors.items()
                if t.dtype not in (*FLOATING, *_WHOLE)]  # fmt: skip
    problems += [f"{k} holds values that are not finite" for k, t in tensors.items()
                 if t.dtype in FLOATING and not bool(torch.isfinite(t).all())]  # fmt: skip
    problems += [f"{k} does not begin with {ROOT}" for k in tensors if not k.startswith(ROOT) and "." in k]
    problems += [] if tensors else ["it holds no tensor"]
    if problems:
        raise AddendaError(f"{shown(file)} holds no adapter that could be read: {'; '.join(problems[:8])}.")
    return tensors


def pattern_key(path: str, paths: Iterable[str]) -> str:
    """Return the key of one path alone in a config's patterns, which match the ends of paths; paths: all there are."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files into a folder that is there. tensors: by full key."""
    stored = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    write_atomically(folder / WEIGHTS, to_bytes(stored, {"format": "pt"}))
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
