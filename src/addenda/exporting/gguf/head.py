"""The head of a GGUF file, read as something that anybody may have written.

Layout (version 3, numbers little-endian): "GGUF", version, counts of tensors and of fields; the fields (key, type,
value); for each tensor its name, sizes (the innermost first), type and offset; then, aligned, the data. Everything is
counted against the size of the file before it is believed, and offsets must be what a writer's are, one tensor behind
the other: no byte is given out twice. (gguf's own reader loops as often as a count in the file says.)
"""

import io
import struct
from dataclasses import dataclass
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import path_of, reading, shown

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST = 1 << 16  # fields, and tensors
_LONGEST = 1 << 20  # bytes of a text
_ITEMS = 1 << 22  # texts in an array: no vocabulary has as many
SIZES = {0: ("float32", 4), 1: ("float16", 2), 30: ("bfloat16", 2)}  # of ggml's types those that adapters have


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. shape: as numpy and torch have it, the innermost last."""

    name: str
    shape: tuple[int, ...]
    type: int  # of ggml
    offset: int  # in the data

    @property
    def dtype(self) -> str:
        """The name of the type of its numbers, "float32"."""
        return SIZES[self.type][0] if self.type in SIZES else f"ggml type {self.type}"

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Head:
    """What stands before the data. fields: numbers and texts by key; of an array its length, as a tuple of one."""

    path: Path
    fields: dict[str, object]
    tensors: tuple[Entry, ...]
    start: int  # of the data
    size: int  # of the file

    def text(self, key: str) -> str:
        """Return a field that is a text, empty where it is none."""
        value = self.fields.get(key)
        return value if isinstance(value, str) else ""


def read_head(given: str | Path) -> Head:
    """Return the head of a GGUF file. Raises AddendaError for one that is missing, damaged, or of another make."""
    path = path_of(given)
    with reading(path):
        if not path.is_file():
            raise AddendaError(f"There is no file {shown(path)}.")
        size = path.stat().st_size
        with open(path, "rb") as f:
            try:
                return _head(path, f, size)
            except (ValueError, struct.error) as error:
                raise AddendaError(f"{shown(path)} is damaged or no GGUF file: {label(error, 600)}.") from None


class _Counted:
    """A file that is read from its start, and never beyond its end."""

    def __init__(self, file: io.BufferedReader, size: int):
        self.file, self.size = file, size

    def left(self) -> int:
        return self.size - self.file.tell()

    def bytes(self, count: int) -> bytes:
        if count > self.left():
            raise ValueError(f"{count:,} bytes are told of at byte {self.file.tell():,}, and the file ends before")
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.left():
            raise ValueError(f"{count:,} bytes are told of at byte {self.file.tell():,}, and the file ends before")
        self.file.seek(count, io.SEEK_CUR)

    def number(self, form: str):
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def length(self) -> int:
        length = self.number("Q")
        if length > _LONGEST:
            raise ValueError(f"a text of {length:,} bytes is told of at byte {self.file.tell():,}")
        return length

    def text(self) -> str:
        return self.bytes(self.length()).decode("utf-8")  # a UnicodeDecodeError is a ValueError

    def value(self) -> object:
        kind = self.number("I")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a field of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _TEXT and count <= _ITEMS:
            for _ in range(count):
                self.skip(self.length())
        else:
            raise ValueError(f"an array of {count:,} of the type {inner}")
        return (count,)


def _head(path: Path, file: io.BufferedReader, size: int) -> Head:
    f = _Counted(file, size)
    if f.bytes(min(4, size)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = f.number("I")
    if version not in (2, 3):
        turned = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise ValueError("big-endian, which is not read here" if turned in (1, 2, 3) else f"version {version}")
    tensors, fields = f.number("Q"), f.number("Q")
    if max(tensors, fields) > min(_MOST, size // 8):
        raise ValueError(f"{tensors:,} tensors and {fields:,} fields are told of in {size:,} bytes")
    values: dict[str, object] = {}
    for _ in range(fields):
        key = f.text()
        if key in values:
            raise ValueError(f"the field {key[:80]!r} is there twice")
        values[key] = f.value()
    entries = [_entry(f) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 16:
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-file.tell() // alignment) * alignment
    _check_places(entries, alignment, size - start)
    return Head(path, values, tuple(entries), start, size)


def _entry(f: _Counted) -> Entry:
    name, dimensions = f.text(), f.number("I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name[:80]} has {dimensions} dimensions")
    shape = tuple(f.number("Q") for _ in range(dimensions))[::-1]
    if not all(1 <= n < 1 << 40 for n in shape):
        raise ValueError(f"{name[:80]} is of shape {shape}")
    return Entry(name, shape, f.number("I"), f.number("Q"))


def _check_places(entries: list[Entry], alignment: int, room: int) -> None:
    """Raise ValueError where tensors have a name twice, stand elsewhere than behind each other, or end too late."""
    names, expected = set(), 0
    for each in entries:
        if each.name in names:
            raise ValueError(f"the tensor {each.name[:80]!r} is there twice")
        names.add(each.name)
        if each.type not in SIZES:  # its bytes are not known here; whoever wants the numbers refuses it
            expected = -1
        if expected >= 0:
            if each.offset != expected:
                raise ValueError(f"{each.name[:80]} stands at {each.offset:,}, and {expected:,} was expected")
            length = each.numbers * SIZES[each.type][1]
            if each.offset + length > room:
                raise ValueError(f"{each.name[:80]} of {length:,} bytes ends behind the end of the file")
            expected += -(-length // alignment) * alignment
