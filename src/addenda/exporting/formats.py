"""Telling whose adapter a file or folder is: ours, PEFT's, GGUF's or kohya's."""

from pathlib import Path
from typing import Literal

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, reading, shown
from addenda.core.file.container import is_pickle, sound
from addenda.core.file.header import of_peft

Format = Literal["addenda", "peft", "gguf", "kohya"]
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_")


def format_of(path: str | Path) -> Format:
    """Return whose format an adapter is in, by what is in the file and not by its name.

    Raises AddendaError where nothing is there, for pickles, and for what is no adapter that any door here reads.
    """
    path = path_of(path)
    with reading(path):
        folder, exists = path.is_dir(), path.exists()
    if not exists:
        raise AddendaError(f"There is no file or folder {shown(path)}.")
    if of_peft(path):
        return "peft"
    if folder:
        names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise AddendaError(
            f"{shown(path)} is a folder without adapter_config.json, so it is no adapter of PEFT. In it: {names}. "
            "Of the other formats give the file itself."
        )
    if not path.is_file():  # a pipe would be waited for, for ever
        raise AddendaError(f"{shown(path)} is a device or a pipe. Name a file or a folder.")
    with reading(path), path.open("rb") as f:
        start = f.read(16)
    if start[:4] == b"GGUF":
        return "gguf"
    if is_pickle(start):
        raise AddendaError(
            f"{shown(path)} is a pickle, which can run code and is never opened. Where you trust it, save its tensors "
            "as safetensors with the program that wrote it."
        )
    return _of_safetensors(path)


def _of_safetensors(path: Path) -> Format:
    with sound(path) as file:
        named, keys = "addenda" in file.metadata, list(file.forms)
    if named:
        return "addenda"
    if any(key.startswith("base_model.") for key in keys):
        return "peft"
    if any(key.startswith(_KOHYA) for key in keys):
        return "kohya"
    raise AddendaError(
        f"{shown(path)} holds {len(keys)} tensors that are no adapter known here (e.g. {', '.join(keys[:3])[:200]}): "
        "neither addenda's, nor PEFT's (base_model.…), nor kohya's (lora_unet_…)."
    )
