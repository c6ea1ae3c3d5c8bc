"""An adapter file that is written a tensor at a time: what has come lies on the disk, and the header is made last.

    with Spool(beside) as spool:
        spool.put("layers.0/A", A)                       # whole, or in pieces by `append`
        spool.write(path, header)                        # what `core.file.header.write` writes, byte for byte

A file of safetensors begins with where everything in it lies, and holds tensors in an order of their dtypes and names.
So they are put into a file of their own as they come, which is copied into that order at the end. Both are there for a
moment: the disk must have room for two of them.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from addenda.core.disk.access import writing
from addenda.core.file.container import bytes_of, layout, sealed
from addenda.core.file.header import BEFORE_DIGEST, Header, metadata_of

_PIECE = 8 << 20  # bytes that are copied at once
Extent = tuple[int, int]  # from where in the spool, and how many bytes


class Spool:
    """The tensors of an adapter file that is being made, in a file of their own. path: where nothing is yet."""

    def __init__(self, path: Path):
        self.path = path
        self._dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._extents: dict[str, list[Extent]] = {}
        self._end = 0

    def __enter__(self) -> "Spool":
        with writing(self.path):
            self._file: BinaryIO = open(self.path, "x+b", buffering=0)  # closed by `__exit__`
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def put(self, key: str, tensor: Tensor) -> None:
        """Add a whole tensor."""
        self._shapes[key], self._dtypes[key] = tuple(tensor.shape), tensor.dtype
        self._extents[key] = [self._written(tensor)]

    def append(self, key: str, piece: Tensor) -> None:
        """Add the next numbers (a vector) of a tensor that is one long vector."""
        (before,) = self._shapes.get(key, (0,))
        self._shapes[key], self._dtypes[key] = (before + len(piece),), piece.dtype
        self._extents.setdefault(key, []).append(self._written(piece))

    def drop(self, key: str) -> None:
        """Leave a tensor out, if it is there."""
        for entries in (self._shapes, self._dtypes, self._extents):
            entries.pop(key, None)

    def write(self, path: Path, header: Header) -> None:
        """Write the file of all that was put, with its header, to where nothing is yet."""
        forms = {k: (self._dtypes[k], shape) for k, shape in self._shapes.items()}
        size = sum(length for extents in self._extents.values() for _, length in extents)
        start, order = layout(metadata_of(header, size), forms)
        with writing(path, len(start) + size), open(path, "xb", buffering=0) as out:
            sha = hashlib.sha256(start)
            _put(out, memoryview(start))
            for key in order:
                for extent in self._extents[key]:
                    for piece in self._read(extent):
                        sha.update(piece)
                        _put(out, piece)
            out.seek(0)
            _put(out, memoryview(sealed(start, BEFORE_DIGEST, sha.hexdigest())))
            os.fsync(out.fileno())

    def _written(self, tensor: Tensor) -> Extent:
        """Write a tensor's bytes behind all that is there, and return where they are."""
        data = bytes_of(tensor)
        extent = self._end, len(data)
        with writing(self.path):
            self._file.seek(self._end)
            _put(self._file, data)
        self._end += len(data)
        return extent

    def _read(self, extent: Extent) -> Iterator[memoryview]:
        begin, length = extent
        buffer = memoryview(bytearray(min(_PIECE, length)))
        self._file.seek(begin)
        while length:
            count = self._file.readinto(buffer[: min(len(buffer), length)])  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{self.path} has become shorter while it was read")
            yield buffer[:count]
            length -= count


def _put(file: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) or 0 :]
