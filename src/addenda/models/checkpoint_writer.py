"""Writing a checkpoint like another: the same shards and names, in any order, a tensor at a time.

    with CheckpointWriter(files, folder) as writer:
        writer.write("model.norm.weight", changed)       # at its place, which is known before anything is written
        writer.copy_rest()                               # all else, from file to file

The header of a shard comes first and says where everything lies, so what is converted together may lie in several
shards, and is written at once.
"""

import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import shown, writing
from addenda.core.disk.atomic import readable
from addenda.models.checkpoint_files import CODES, INDEX, CheckpointFiles, StoredTensor

_PIECE = 16 << 20  # bytes that are copied at once
_ALIGNED = 8  # bytes: headers of safetensors end at a multiple of this


@dataclass(frozen=True)
class Added:
    """A tensor that the other checkpoint has not."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointWriter:
    """The shards of a new checkpoint, laid out like those of `files`.

    dtype: of all floating tensors, where not as they are. added: further tensors by name, put behind those of the last
    shard; dropped: names that are left out.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        added: Mapping[str, Added] | None = None,
        dropped: Iterable[str] = (),
    ):
        self.files, self.folder, self.dtype = files, folder, dtype
        self.dropped, self.added = frozenset(dropped), dict(added or {})
        self.tensors: dict[str, StoredTensor] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        last = list(files.shards)[-1]
        for shard in files.shards:
            self._lay_out(shard, self.added if shard == last else {})
        self._open: dict[str, BinaryIO] = {}
        self._left = set(self.tensors)
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(self._sizes.values())

    def _lay_out(self, shard: str, added: Mapping[str, Added]) -> None:
        """Say where every tensor of a shard will lie, and what its header is: the other's own where all is as there."""
        entries = [(n, self.files.tensors[n].shape, self.dtype_of(n)) for n in self.files.shards[shard].names]
        entries = [e for e in entries if e[0] not in self.dropped]
        same = not added and all(CODES.get(d) == self.files.tensors[n].code for n, _, d in entries)
        entries += [(n, a.shape, a.dtype) for n, a in added.items()]
        if same and len(entries) == len(self.files.shards[shard].names):
            self.tensors |= {n: self.files.tensors[n] for n, _, _ in entries}
            begin = min((self.files.tensors[n].begin for n, _, _ in entries), default=self.files.shards[shard].size)
            with open(self.files.folder / shard, "rb") as file:
                self._headers[shard] = file.read(begin)
            self._sizes[shard] = self.files.shards[shard].size
            return
        entries.sort(key=lambda e: -e[2].itemsize)  # wide ones first, so that each begins at a multiple of its size
        places, at = {}, 0
        for name, shape, dtype in entries:
            end = at + torch.Size(shape).numel() * dtype.itemsize
            places[name] = (CODES[dtype], shape, at, end)
            at = end
        metadata = dict(self.files.shards[shard].metadata) or {"format": "pt"}
        header: dict = {"__metadata__": metadata}
        header |= {n: {"dtype": c, "shape": list(s), "data_offsets": [b, e]} for n, (c, s, b, e) in places.items()}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        self._headers[shard] = len(text).to_bytes(8, "little") + text
        start = len(self._headers[shard])
        self.tensors |= {
            n: StoredTensor(shard, c, tuple(s), start + b, start + e) for n, (c, s, b, e) in places.items()
        }
        self._sizes[shard] = start + at

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor of the other checkpoint is written."""
        stored = self.files.tensors[name].dtype
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    # -- writing -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "CheckpointWriter":
        for shard, header in self._headers.items():
            path = self.folder / shard
            with writing(path, self._sizes[shard]):
                file = open(path, "xb", buffering=0)  # closed by `__exit__`
                self._open[shard] = file
                file.truncate(self._sizes[shard])
                self._put(file, 0, memoryview(header))
        return self

    def __exit__(self, kind, *_) -> None:
        for file in self._open.values():
            file.close()
        if kind is None and self._left:
            raise AddendaError(f"{len(self._left)} tensors were not written, e.g. {min(self._left)}.")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor at its place, cast to the dtype that it has there. Raises AddendaError for another shape."""
        place = self.tensors[name]
        if tuple(tensor.shape) != place.shape:
            raise AddendaError(f"{name} is to be {[*place.shape]}, got {[*tensor.shape]}.")
        data: Any = tensor.to(place.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        with writing(self.folder / place.shard):
            self._put(self._open[place.shard], place.begin, memoryview(data))
        self._left.discard(name)

    def copy_rest(self) -> None:
        """Write every tensor that was not written yet as the other checkpoint has it."""
        for name in [n for n in self.tensors if n in self._left]:
            source, place = self.files.tensors[name], self.tensors[name]
            path = self.folder / place.shard
            with open(self.files.folder / source.shard, "rb", buffering=0) as file, writing(path):
                if source.code == place.code:
                    self._copy(file, source.begin, self._open[place.shard], place.begin, source.size)
                else:
                    self._cast(file, source, place)
            self._left.discard(name)

    def write_index(self) -> None:
        """Write the index file, where the other checkpoint has one."""
        if self.files.index is None:
            return
        metadata = dict(self.files.index.get("metadata") or {})
        metadata["total_size"] = sum(t.size for t in self.tensors.values())
        if "total_parameters" in metadata and (self.added or self.dropped):
            del metadata["total_parameters"]
        index = {"metadata": metadata, "weight_map": {n: t.shard for n, t in sorted(self.tensors.items())}}
        path = self.folder / INDEX
        with writing(path):
            path.write_text(readable(index) + "\n", encoding="utf-8")

    def _put(self, file: BinaryIO, place: int, data: memoryview) -> None:
        """Write bytes at a place of a file; threads do not wait for each other where the system can do that."""
        written = 0
        while written < len(data):
            piece = data[written : written + (1 << 30)]
            if hasattr(os, "pwrite"):
                written += os.pwrite(file.fileno(), piece, place + written)
                continue
            with self._lock:
                file.seek(place + written)
                written += file.write(piece) or 0

    def _cast(self, file: BinaryIO, source: StoredTensor, place: StoredTensor) -> None:
        """Copy a tensor in another dtype, a piece at a time."""
        begin = 0
        while begin < source.size:
            data = bytearray(min(_PIECE, source.size - begin))
            file.seek(source.begin + begin)
            if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise AddendaError(f"{shown(file.name)} has become shorter while it was read. Get it again.")
            read = torch.frombuffer(data, dtype=source.dtype)
            cast = read.to(place.dtype)
            if not bool((torch.isfinite(cast) | ~torch.isfinite(read)).all()):
                raise AddendaError(
                    f"A weight of {shown(file.name)} has numbers up to {float(read.abs().max()):.3g}, beyond what "
                    f"{str(place.dtype).removeprefix('torch.')} holds. Give dtype='bfloat16' or 'float32'."
                )
            piece: Any = cast.view(torch.uint8).numpy()
            at = place.begin + begin // source.dtype.itemsize * place.dtype.itemsize
            self._put(self._open[place.shard], at, memoryview(piece))
            begin += len(data)

    def _copy(self, source: BinaryIO, begin: int, target: BinaryIO, place: int, size: int) -> None:
        """Copy bytes from file to file, by the system itself where it can."""
        copied = 0
        if hasattr(os, "copy_file_range"):
            ends = source.fileno(), target.fileno()
            with suppress(OSError):  # two disks, or a system that cannot; what is wrong with a disk is said below
                while copied < size:
                    count = os.copy_file_range(*ends, size - copied, begin + copied, place + copied)
                    copied += count
                    if not count:
                        break
        source.seek(begin + copied)
        while copied < size:
            piece = source.read(min(_PIECE, size - copied))
            if not piece:
                raise AddendaError(f"{shown(source.name)} has become shorter while it was read. Get it again.")
            self._put(target, place + copied, memoryview(piece))
            copied += len(piece)
