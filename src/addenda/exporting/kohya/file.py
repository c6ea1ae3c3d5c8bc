"""A file of kohya or LyCORIS, checked for form: which parts it has, which modules in each, which tensors at each."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import path_of, reading, shown
from addenda.core.file.container import sound
from addenda.core.file.header import FLOATING
from addenda.exporting.kohya.names import split

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

Modules = dict[str, dict[str, Tensor]]  # by flat name, the tensors by suffix


@dataclass
class KohyaFile:
    """What a file holds. parts: "lora_unet", "lora_te1", …, each with its modules; metadata: as sd-scripts notes it."""

    path: Path
    parts: dict[str, Modules] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_file(path: str | Path) -> KohyaFile:
    """Return what a file holds, checked against no model.

    Raises AddendaError for a file that is missing, damaged, a pickle or of another make, and for tensors that are not
    floating or not finite.
    """
    file = path_of(path)
    _check(file)
    with sound(file) as opened:
        keys, metadata = sorted(opened.forms), opened.metadata
        tensors = opened.tensors() if any(map(split, keys)) else {}  # a large file of another make stays unread
    foreign = [k for k in keys if split(k) is None]
    if len(foreign) == len(keys):
        raise AddendaError(
            f"{shown(file)} is no file of kohya or LyCORIS: no key in it begins with lora_unet_, lora_te_ or the like"
            f"{f', e.g. {label(foreign[0])}' if foreign else ''}."
        )
    problems = [f"{label(k)} is no key of this format" for k in foreign]
    found = KohyaFile(file, metadata=metadata)
    for key in keys:
        parsed = split(key)
        if parsed is None:
            continue
        part, name, suffix = parsed
        tensor = tensors[key]
        if tensor.dtype not in FLOATING:
            problems.append(f"{label(key)} is {str(tensor.dtype).removeprefix('torch.')}, and numbers are expected")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{label(key)} holds values that are not finite")
        found.parts.setdefault(part, {}).setdefault(name, {})[suffix] = tensor
    if problems:
        raise AddendaError(
            f"{shown(file)} cannot be read, and nothing was attached. {len(problems)} problems: "
            f"{'; '.join(problems[:12])}{' …' if len(problems) > 12 else ''}."
        )
    return found


def _check(file: Path) -> None:
    """Raise AddendaError for a pickle, and where no file is."""
    with reading(file):
        exists = file.is_file()
    if file.suffix.lower() in _PICKLES:
        raise AddendaError(
            f"{shown(file)} is a pickle, which can run code and is never opened. Save it as safetensors where it was "
            "made, or with a converter that you trust."
        )
    if not exists:
        raise AddendaError(f"There is no file {shown(file)}; give the .safetensors file of a LoRA.")
