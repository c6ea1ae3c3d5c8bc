"""The weights of a transformers folder as they lie in its safetensors files, read one tensor at a time.

    files = CheckpointFiles.of(folder)
    files.tensors["model.embed_tokens.weight"]           # in which shard, dtype, shape, bytes
    files.read("model.embed_tokens.weight")              # a tensor of its own; nothing else is in memory
    files.pieces("model.embed_tokens.weight")            # the same, a few numbers at a time

The names are the files' own; `models.named_weights` says what a model calls them. Only a tensor's own bytes are mapped,
and only as long as it lives: pages of a whole file that is mapped count as memory until it is closed.
"""

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import check_values, parse_json, read_json, reading, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE = 1 << 18  # numbers of a tensor that is read in pieces: what is computed of one stays in the processor
_MOST = 256 << 20  # bytes of a header
_ALONE = 4 << 20  # bytes of a header that is longer than the tensors behind it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: the shard it lies in, and where there. begin, end: bytes from the file's start."""

    shard: str
    code: str  # of its dtype, as safetensors writes it
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype as torch has it. Raises AddendaError for one that this version cannot read."""
        if self.code not in DTYPES:
            raise AddendaError(f"{self.shard} holds tensors of the type {label(self.code)}, which cannot be read here.")
        return DTYPES[self.code]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: the names of its tensors in the order in which they lie, and its free entries."""

    names: tuple[str, ...]
    metadata: Mapping[str, str]
    size: int  # bytes of the file


@dataclass(frozen=True)
class CheckpointFiles:
    """A folder's weights by the names in its files."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    shards: Mapping[str, Shard]
    index: Mapping[str, Any] | None  # the index file, where there are several shards

    @classmethod
    def of(cls, folder: Path) -> "CheckpointFiles":
        """Read the headers of a folder's shards; no tensor is read.

        Raises AddendaError for a folder without safetensors weights, an index that names files or tensors which are not
        there, and files that are damaged.
        """
        names, index = shards_of(folder)
        tensors: dict[str, StoredTensor] = {}
        shards = {}
        for name in names:
            shards[name] = _read_header(folder, name, tensors)
        if index is not None:
            _check_index(folder, index["weight_map"], tensors)
        return cls(folder, tensors, shards, index)

    def read(self, name: str) -> Tensor:
        """Return one tensor; what is written into it stays in memory. Raises AddendaError where its file is shorter."""
        entry = self.tensors[name]
        if not entry.size:
            return torch.empty(entry.shape, dtype=entry.dtype)
        path = self.folder / entry.shard
        with reading(path), open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < entry.end:
                raise AddendaError(f"{shown(path)} has become shorter since its header was read. Get it again.")
            before = entry.begin % mmap.ALLOCATIONGRANULARITY
            begin, length = entry.begin - before, before + entry.size
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
        if before % entry.dtype.itemsize:  # very old files, whose headers have any length
            made = torch.frombuffer(bytearray(pages[before:]), dtype=entry.dtype).view(entry.shape)
        else:
            made = torch.frombuffer(pages, dtype=entry.dtype, offset=before).view(entry.shape)
        if entry.dtype == torch.bool and int(made.view(torch.uint8).max()) > 1:
            raise AddendaError(f"{shown(path)} is damaged: {label(name)} is neither true nor false. Get it again.")
        return made

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's numbers in their order, as vectors of `PIECE` or less; each lies where the last one did.

        Raises AddendaError where its file is shorter.
        """
        entry = self.tensors[name]
        path, count = self.folder / entry.shard, entry.size // entry.dtype.itemsize
        buffer = torch.empty(min(PIECE, count), dtype=entry.dtype)
        data: Any = buffer.view(torch.uint8).numpy()
        with reading(path), open(path, "rb", buffering=0) as file:
            file.seek(entry.begin)
            for begin in range(0, count, PIECE):
                piece = buffer[: min(PIECE, count - begin)]
                left = memoryview(data)[: piece.nbytes]
                while len(left):
                    read = file.readinto(left)
                    if not read:
                        raise AddendaError(f"{shown(path)} has become shorter since its header was read. Get it again.")
                    left = left[read:]
                yield piece


def shards_of(folder: Path) -> tuple[list[str], dict | None]:
    """Return the names of a folder's weight files, and its index where it has one."""
    with reading(folder):
        single, several = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single:  # as transformers chooses, where both are there
        return [SINGLE], None
    if not several:
        with reading(folder):
            names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        advice = (
            f"Its weights are pickled ({', '.join(pickled[:3])}), which is not read, as it may run code: load it where "
            "you trust it, and save it again with save_pretrained(new, safe_serialization=True)."
            if pickled
            else f"It holds: {', '.join(names[:8]) or 'nothing'}. Get its files again."
        )
        raise AddendaError(f"{shown(folder)} has neither {SINGLE} nor {INDEX}. {advice}")
    index = read_json(folder / INDEX)
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise AddendaError(f"{shown(folder / INDEX)} is no index of shards: it wants 'weight_map' with their names.")
    if not isinstance(index.get("metadata") or {}, dict):
        raise AddendaError(f"{shown(folder / INDEX)} is no index of shards: its 'metadata' is no object.")
    names = sorted(set(mapping.values()))
    if outside := [n for n in names if Path(n).name != n or n.startswith(".") or not n.endswith(".safetensors")]:
        raise AddendaError(
            f"{shown(folder / INDEX)} names {label(outside[0])!r}, which is no safetensors file beside it."
        )
    with reading(folder):
        missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise AddendaError(
            f"{shown(folder / INDEX)} names {len(names)} files, and {len(missing)} of them are not there: "
            f"{', '.join(map(label, missing[:4]))}. Get the folder again."
        )
    return names, index


def _read_header(folder: Path, name: str, tensors: dict[str, StoredTensor]) -> Shard:
    """Read the header of one shard and add its tensors. safetensors itself checks that offsets and sizes agree."""
    path = folder / name
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > min(_MOST, size) or length > max(_ALONE, size - 8 - length):
                raise ValueError(f"a header of {length:,} bytes")
            text = file.read(length)
        check_values(text, size)
        header = parse_json(text.decode("utf-8"), room=size)
        with safe_open(path, framework="pt"):
            pass
        metadata = header.pop("__metadata__", None) or {}
        entries = {}
        for key, raw in header.items():
            begin, end = raw["data_offsets"]
            entries[key] = StoredTensor(name, raw["dtype"], tuple(raw["shape"]), 8 + length + begin, 8 + length + end)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AddendaError(f"{shown(path)} is damaged: {label(error, 300)}. Get it again.") from None
    except OSError as error:
        raise AddendaError(f"{shown(path)} cannot be read ({error.strerror or error}).") from None
    for key, entry in entries.items():
        if entry.code in DTYPES and math.prod(entry.shape) * entry.dtype.itemsize != entry.size:
            raise AddendaError(f"{shown(path)} is damaged: {label(key)} is not of the size that it says. Get it again.")
        if key in tensors:
            raise AddendaError(f"{label(key)} lies in two files of {shown(folder)}: {tensors[key].shard} and {name}.")
    tensors |= entries
    return Shard(tuple(sorted(entries, key=lambda k: (entries[k].begin, entries[k].end))), metadata, size)


def _check_index(folder: Path, mapping: dict[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    wrong = [k for k, shard in mapping.items() if k not in tensors or tensors[k].shard != shard]
    if wrong:
        raise AddendaError(
            f"{shown(folder / INDEX)} and its files disagree: {len(wrong)} tensors are not where it says, e.g. "
            f"{', '.join(map(label, wrong[:3]))}. Get the folder again."
        )
