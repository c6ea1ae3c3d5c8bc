"""What is looked at in a model's folder before any library reads it: anybody may have written it.

    check_folder(folder)             nothing pickled, no weights outside of it, no layers without a weight
    check_tokens(folder)             no names in its tokenizer's files that would be printed and control a terminal
    check_size(config, auto, folder) the model that its configuration describes is one that its weights could fill

transformers opens a pickle where an index or config.json names one, reads shards in other folders, and makes room for
all that config.json claims before it compares that with the weights.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import check_values, reading, shown
from addenda.models.checkpoint_files import INDEX, SINGLE, CheckpointFiles, shards_of

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER = (".h5", ".msgpack", ".ot", ".npz", ".npy")  # of other frameworks; some can hold pickles
_MOST = 16 << 20  # bytes of a configuration
_LAYERS = 10_000  # where no weights say how many there can be
_LABELS = 1 << 20  # of a classifier: a configuration names each of them as it is read
_FREE = 1 << 23  # numbers beyond those that the weights can be, for new heads: 32 MiB
_MASKS = 1 << 26  # entries of buffers: GPT-2 keeps a mask of 1,024 × 1,024 bits in every layer
_COUNTS = re.compile(r"((num|n|max|encoder|decoder)_)?((hidden|encoder|decoder|window|text|vision)_)?(layers?|depths?)")


def check_folder(folder: Path) -> None:
    """Raise AddendaError for a folder that no library should be given: see above. Nothing but names and JSON is read.

    A folder without any weights passes: it may hold a tokenizer, or a configuration alone.
    """
    with reading(folder):
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    weights = SINGLE in names or INDEX in names
    if not weights and (found := [n for n in names if _is_weights(n)]):
        raise AddendaError(_pickled(folder, found))
    if weights:
        CheckpointFiles.of(folder)  # headers only, strictly: what transformers reads of them must be what was checked
    config = entries_in(folder / "config.json")
    named = config.get("transformers_weights")
    if named is not None:
        raise AddendaError(
            f"{shown(folder / 'config.json')} names the file of its weights (transformers_weights: {label(named)!r}), "
            f"and they are read from {SINGLE}, or from the shards in {INDEX}, only: what a folder names may be a "
            "pickle. Take the entry out of it."
        )
    _check_counts(folder, config)


def _is_weights(name: str) -> bool:
    """Return whether a file holds weights in a form that is not read; training_args.bin is no weights."""
    stem = name.split(".")[0]
    known = stem.startswith(
        ("pytorch_model", "model", "tf_model", "flax_model", "rust_model", "consolidated", "adapter_model")
    )
    kinds = (*PICKLED, *OTHER, *(f"{kind}.index.json" for kind in PICKLED))
    return name.lower().endswith(kinds) and (known or Path(name).suffix.lower() in PICKLED[1:])


def _pickled(folder: Path, found: list[str]) -> str:
    pickles = any(Path(n.removesuffix(".index.json")).suffix.lower() in PICKLED for n in found)
    why = "pickles, which can run code as they are opened" if pickles else "a form that is not read"
    return (
        f"{shown(folder)} holds its weights as {', '.join(map(label, found[:3]))} only: {why}. Only safetensors are "
        "opened. Where you trust whoever wrote them, load the folder with transformers in an environment of its own "
        "and save it again, model.save_pretrained(new, safe_serialization=True); then give the new folder."
    )


def _check_counts(folder: Path, config: dict) -> None:
    """Raise AddendaError where a configuration claims more layers than there are weights: each wants one."""
    where = shown(folder / "config.json")
    for key, value in _entries(config):
        if key == "num_labels" and type(value) is int and value > _LABELS:
            raise AddendaError(f"{where} claims {key}: {_amount(value)}, which no classifier has. Get it again.")
        claimed = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        most = max(claimed, default=0) if _COUNTS.fullmatch(key) else 0
        if most <= 64:  # cheap to make, whatever the weights are
            continue
        with reading(folder):
            here = any((folder / name).is_file() for name in (SINGLE, INDEX))
        stored = len(CheckpointFiles.of(folder).tensors) if here else _LAYERS
        if most > stored:
            raise AddendaError(
                f"{where} claims {key}: {_amount(most)}, and "
                + (
                    f"its weights are {stored:,} tensors in all. "
                    if here
                    else f"{_LAYERS:,} is the most that is made. "
                )
                + "They do not belong together; get both from one source."
            )


def _amount(n: int) -> str:
    return f"{n:,}" if n.bit_length() < 100 else "a number of many digits"


def _entries(config: dict, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a configuration and of those inside it."""
    for key, value in config.items():
        if isinstance(value, dict) and depth:
            yield from _entries(value, depth - 1)
        else:
            yield str(key), value


def check_size(config: Any, auto: str, folder: Path) -> None:
    """Raise AddendaError for a configuration of a model that is far larger than the weights in its folder.

    It is made on the meta device, in no memory. Classes of the folder's own are left to whoever trusts them.
    """
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    mapping = getattr(transformers, auto)._model_mapping
    if type(config) not in mapping:
        return
    try:
        with torch.device("meta"):
            model = _get_model_class(config, mapping)(config)
    except Exception:  # of whatever class: whoever loads it says why it cannot be made
        return
    wanted = sum(p.numel() for p in model.parameters())
    masks = sum(b.numel() for b in model.buffers())
    stored = sum(os.path.getsize(folder / name) for name in shards_of(folder)[0])
    if (
        wanted > 8 * stored + _FREE or masks > 8 * stored + _MASKS
    ):  # few bits: no form has more than eight weights in a byte
        raise AddendaError(
            f"The config.json in {shown(folder)} describes a {type(model).__name__} of {wanted + masks:,} numbers, and "
            f"its weights are {stored:,} bytes: they have other shapes than it says, or most are missing. Weights and "
            "config.json do not belong together; get both from one source."
        )


def check_tokens(folder: Path) -> None:
    """Raise AddendaError where what a tokenizer's folder says of its tokens has names that no option has.

    The tokenizers library prints the names of options that it does not know as they are, ESC and all.
    """
    config, special = (entries_in(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    told: dict[str, Any] = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    if "added_tokens_decoder" not in config:  # else transformers looks no further
        told["tokenizer.json"] = _added_tokens(folder / "tokenizer.json")
    for file, entries in told.items():
        if odd := next((key for key in _keys(entries) if label(key, 64) != key), None):
            raise AddendaError(
                f"{shown(folder / file)} has an entry {label(odd, 64)!r}, and no option of a tokenizer is called so: "
                "its name is too long, or holds what controls a terminal. Get the tokenizer again from its source."
            )


def _added_tokens(file: Path) -> list:
    """Return the tokens that a tokenizer.json adds; none where it cannot be read, as whoever wants it will complain."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    found = content.get("added_tokens") if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def _keys(entries: Any) -> Iterator[str]:
    """Yield the name of every entry, however deep."""
    waiting = [entries]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def entries_in(file: Path) -> dict:
    """Read a JSON file; nothing where it cannot be read, as whoever wants it will complain.

    Raises AddendaError for one that is larger, or has more values, than any configuration.
    """
    try:
        if not file.is_file():
            return {}
        if file.stat().st_size > _MOST:
            raise AddendaError(
                f"{shown(file)} has {file.stat().st_size:,} bytes, more than any configuration has. Get it again."
            )
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    try:
        check_values(text)
    except ValueError as error:  # transformers would read it all the same
        raise AddendaError(f"{shown(file)} is no configuration: {error}. Get it again.") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
