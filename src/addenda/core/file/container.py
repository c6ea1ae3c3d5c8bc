"""Files of safetensors, read strictly and written whole: every key once, every byte of one tensor, a digest in place.

    with opened(path) as file:
        file.metadata, file.forms                           # of the header; no tensor has been read
        tensors, digest = file.proven(before)               # or file.tensors(), of a file without a digest
    write(path, metadata, tensors, before)

The layout is the one of the safetensors library: the length of a JSON header (8 bytes), the header, the tensors. That
library takes a key that stands twice, and its file has no mark of its own bytes. Here a file whose first bytes are the
caller's `before` carries a SHA-256 behind them: of the whole file, with its own 64 characters taken as zeros. It is
computed from the bytes that become tensors, while they are read, so nothing can change between the look and the use.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import check_values, parse_json, reading, shown
from addenda.core.disk.atomic import write_atomically

MOST = 64 << 20  # bytes of a header
_ALONE = 4 << 20  # bytes of a header that is longer than the tensors behind it
DIGITS = 64  # of a SHA-256, in hexadecimal
_PIECE = 1 << 20  # bytes that are worth handing to another thread
_ALIGNED = 8  # bytes: headers end at a multiple of this
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
Form = tuple[torch.dtype, tuple[int, ...]]  # of a tensor


class Opened:
    """A file whose header has been read.

    size: its bytes; metadata: its texts by name; forms: of its tensors, in the order of bytes. file: on disk, or its
    bytes in memory, whose number is given.
    """

    def __init__(self, file: FileIO | BytesIO, size: int | None = None):
        self.size = size = os.fstat(file.fileno()).st_size if size is None else size
        self._file, self._length = file, file.read(8)
        count = int.from_bytes(self._length, "little")
        if len(self._length) < 8 or count > min(MOST, size - 8) or count > max(_ALONE, size - 8 - count):
            raise ValueError(_instead(self._length, size))
        self._header = bytearray(count)
        _fill(file, memoryview(self._header))
        self.metadata, self.forms = _entries(self._parsed(size), size - 8 - count)

    def _parsed(self, size: int) -> Any:
        check_values(self._header, size)  # before it is a text
        return parse_json(self._header.decode("utf-8"), room=size)

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors, in the order of their bytes, into memory of their own; once."""
        return self._tensors(None)

    def proven(self, before: bytes) -> tuple[dict[str, Tensor], str | None]:
        """Read the tensors, once, and return them with the file's digest; None where it does not begin with `before`.

        Raises ValueError where the bytes have another digest than the one that stands in the file.
        """
        if not self._header.startswith(before):
            return self._tensors(None), None
        place = slice(len(before), len(before) + DIGITS)
        claimed = self._header[place].decode("ascii", "replace")
        self._header[place] = b"0" * len(self._header[place])
        with _Hashing(self._length + self._header) as hashing:
            made = self._tensors(hashing)
        found = hashing.digest()
        if claimed != found:
            raise ValueError(
                f"its bytes have the SHA-256 {found[:16]}…, and those that were saved had {claimed[:16]}…: something "
                "in it has changed since"
            )
        return made, found

    def _tensors(self, hashing: "_Hashing | None") -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for key, (dtype, shape) in self.forms.items():
            # in memory that torch itself has chosen, as for every other tensor: sums are taken in the same order; a
            # default device would get a tensor of its own, and what is read a copy of it
            made[key] = tensor = torch.empty(shape, dtype=dtype, device="cpu")
            piece = bytes_of(tensor)
            _fill(self._file, piece)
            if hashing is not None:
                hashing.add(piece)
            if dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
                raise ValueError(f"tensor {key[:200]!r} holds bytes that are neither true nor false")
        return made


class _Hashing:
    """The SHA-256 of pieces, in their order; in a `with` block a thread hashes large ones while the next are read."""

    def __init__(self, start: bytes):
        self._sha = hashlib.sha256(start)
        self._pool = ThreadPoolExecutor(1)  # no thread before there is work for it
        self._waiting: list[memoryview] = []
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()

    def add(self, piece: memoryview) -> None:
        self._waiting.append(piece)
        self._size += len(piece)
        if self._size > _PIECE:
            self._pool.submit(self._update, self._waiting)
            self._waiting, self._size = [], 0

    def _update(self, pieces: list[memoryview]) -> None:
        for piece in pieces:
            self._sha.update(piece)

    def digest(self) -> str:
        """Return the digest of all pieces, after the `with` block."""
        self._update(self._waiting)
        return self._sha.hexdigest()


def is_pickle(start: bytes) -> bool:
    """Return whether a file that begins so is a pickle, alone or packed as torch.save does.

    The length of a header may begin so too: then the header's first character follows it.
    """
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[8:9] != b"{")


def _instead(length: bytes, size: int) -> str:
    """Return what a file is, where the length of its header cannot be one."""
    if size < 8:
        return f"it has {size} bytes, and the length of a header alone takes 8" if size else "it is empty"
    if is_pickle(length):
        return (
            "it begins as a pickle does (torch.save), which can run code and is never opened; the program that wrote "
            "it may write safetensors too"
        )
    count = int.from_bytes(length, "little")
    return f"it claims a header of {count:,} bytes, which is more than there can be"


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a file for a `with` block, in which its header is known and its tensors may be read.

    Raises ValueError for a header that is too long, no strict JSON, or tells of more or fewer bytes than there are, and
    OSError where the disk fails. Memory is that of the file's own bytes, whatever it claims.
    """
    with open(path, "rb", buffering=0) as file:
        yield Opened(file)


@contextmanager
def sound(path: Path) -> Iterator[Opened]:
    """Open a file as `opened` does, for a `with` block. Raises AddendaError for what `opened` and the reading raise."""
    try:
        with reading(path), opened(path) as file:
            yield file
    except (ValueError, RecursionError) as error:
        raise AddendaError(
            f"{shown(path)} is no sound safetensors file: {label(error, 300)}. Copy or save it again."
        ) from None


def says(path: Path, entry: str) -> bool:
    """Return whether a file is a sound one whose metadata has this entry: what kind of file it says that it is."""
    try:
        with sound(path) as file:
            return entry in file.metadata
    except AddendaError:
        return False


def write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], before: bytes | None = None) -> None:
    """Write a file atomically, with its digest in place of the zeros that stand behind `before`."""
    start, order = layout(metadata, {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()})
    pieces = [bytes_of(tensors[key]) for key in order]
    if before is not None:
        sha = hashlib.sha256(start)
        for piece in pieces:
            sha.update(piece)
        start = sealed(start, before, sha.hexdigest())
    write_atomically(path, [start, *pieces])


def layout(metadata: Mapping[str, str], forms: Mapping[str, Form]) -> tuple[bytes, list[str]]:
    """Return what stands before the tensors, as safetensors writes it, and the order in which they follow."""
    # that library's own order, by dtypes and names, taken from a file of one number each
    small = to_bytes({key: torch.zeros(1, dtype=dtype, device="cpu") for key, (dtype, _) in forms.items()})
    order = list(json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for key in order:
        dtype, shape = forms[key]
        end = begin + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text, order


def sealed(start: bytes, before: bytes, digest: str) -> bytes:
    """Return what stands before the tensors with the digest in place of its zeros."""
    at = 8 + len(before)
    if start[8:at] != before or start[at : at + DIGITS] != b"0" * DIGITS:
        raise ValueError("a header with a digest begins otherwise")  # of whoever writes, never of a file
    return start[:at] + digest.encode() + start[at + DIGITS :]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes; its own memory where it lies in the processor's, in order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def _fill(file: FileIO | BytesIO, buffer: memoryview) -> None:
    """Read until a buffer is full. Raises ValueError where the file ends before."""
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise ValueError("the file became shorter while it was read")
        buffer = buffer[count:]


def _entries(header: Any, size: int) -> tuple[dict[str, str], dict[str, Form]]:
    """Return the metadata and the tensors' forms in the order of their bytes. Raises ValueError for what is off."""
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("__metadata__ must be texts by name")
    forms: dict[str, Form] = {}
    extents: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {key[:200]!r} needs dtype, shape and data_offsets, and nothing else")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in _DTYPES:
            raise ValueError(f"tensor {key[:200]!r} has an unknown dtype {str(code)[:40]!r}")
        if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
            raise ValueError(f"tensor {key[:200]!r}: shape and data_offsets must be whole numbers, two offsets")
        if math.prod(n for n in shape if n) >= 2**62:  # more than torch can count, be there as many or none
            raise ValueError(f"tensor {key[:200]!r} has a shape that no tensor has")
        (begin, end), dtype = offsets, _DTYPES[code]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {key[:200]!r} has other bytes than {code} {shape} takes")
        forms[key] = dtype, tuple(shape)
        extents.append((begin, end, key))
    at = 0
    for begin, end, key in sorted(extents):
        if begin != at:
            raise ValueError(f"tensor {key[:200]!r} begins at byte {begin:,}, and {at:,} are taken before it")
        at = end
    if at != size:
        raise ValueError(f"the header tells of {at:,} bytes of tensors, and {size:,} are there")
    return metadata, {key: forms[key] for _, _, key in sorted(extents)}


def _naturals(numbers: Any) -> bool:
    return isinstance(numbers, list) and len(numbers) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in numbers)
