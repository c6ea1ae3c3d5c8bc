"""Reading and writing: failures of the disk as errors that say what to do, and JSON that anybody may have written.

A path that a user gives is read with `~`; a failure of the system (a full disk, a folder that may not be written to, a
file in the way, a name that is too long) is a `DiskError`, which is both an AddendaError and an OSError.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError

MOST = 32 << 20  # bytes of a JSON file
_VALUES = 1 << 19  # of JSON, an object for three: 32 MiB or less in memory
_WAYS = {
    errno.ENAMETOOLONG: "The name is too long for this disk: choose a shorter one",
    errno.ENOTDIR: "A file stands where a folder is wanted: name another place, or move the file",
    errno.EEXIST: "A file stands where a folder is wanted: name another place, or move the file",
    errno.EISDIR: "A folder stands where a file is wanted: name a file",
    errno.EACCES: "Give yourself the right to it, or name another place",
    errno.EPERM: "Give yourself the right to it, or name another place",
    errno.EROFS: "The disk can only be read: name another place",
    errno.ELOOP: "Symbolic links lead in a circle there: name another place",
    errno.ENOENT: "Make the folder, or name another place",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM = 1 << 16  # bytes free, below which an error of torch's writer, which tells no reason, is of a full disk


class DiskError(AddendaError, OSError):
    """A failure of the disk or of a path; `errno` is the system's."""


def path_of(given: str | Path, what: str = "path") -> Path:
    """Return a user's path with `~` expanded. Raises AddendaError for an empty one, or one that no system has."""
    if not isinstance(given, str | os.PathLike):
        kind = type(given).__name__  # a model says all of its layers of itself, and a list all that it holds
        raise AddendaError(f"{what} is the path of a file or folder, got a thing in memory ({kind}). Name where it is.")
    text = os.fspath(given)
    if not text.strip() or "\0" in text:
        raise AddendaError(f"{what} is {text!r}, which names nothing. Name a file or a folder.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # a user that there is not
        raise AddendaError(f"{what} is {text!r}: {error}. Write the path out.") from None


def file_of(given: str | Path, what: str = "path") -> Path:
    """Return a path to write a file to. Raises AddendaError where a folder is, or the path names nothing."""
    path = path_of(given, what)
    with reading(path):
        folder = path.is_dir()
        special = not folder and path.exists() and not path.is_file()
    if folder:
        raise AddendaError(f"{path} is a folder. Name a file, such as {path / 'adapter.safetensors'}.")
    if special:
        raise AddendaError(f"{path} is a device or a pipe, and a file is written whole or not at all. Name a file.")
    with reading(path):
        check_above(path, what)
    return path


def check_above(path: Path, what: str = "path") -> None:
    """Raise AddendaError where nothing can be made at a path.

    That is where a file stands in the place of a folder above it, and where the folder may not be written to.
    """
    above = next((p for p in path.absolute().parents if p.exists()), None)
    if above is not None and not above.is_dir():
        raise AddendaError(f"{shown(path)} cannot be made, since {shown(above)} is no folder. Choose another {what}.")
    if above is not None and not os.access(above, os.W_OK):
        number = errno.EROFS if _is_read_only(above) else errno.EACCES
        failure = DiskError(f"{shown(path)} cannot be made in {shown(above)} ({os.strerror(number)}). {_WAYS[number]}.")
        failure.errno = number
        raise failure


def _is_read_only(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn failures to write, in a `with` block, into errors that say what is free and how to go on. size: in bytes."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if not _of_disk(error):
            raise
        number = getattr(error, "errno", None) or _number_in(str(error))
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        full = number in _FULL or "No space left" in str(error) or (number is None and _room(path) < _NO_ROOM)
        amount = "" if size is None else f" for {amount_of(size)}"
        advice = "Make room" if full else _WAYS.get(number or 0, "Make room, or name another place")
        failure = DiskError(
            f"{'The disk is full' if full else 'Could not write'} at {shown(path)}{amount} ({reason}{_free(path)}). "
            f"What is done is kept. {advice}, and the same command goes on."
        )
        failure.errno = number
        raise failure from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn failures to read a path, in a `with` block, into errors that name it."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        advice = _WAYS.get(error.errno or 0, "Look at the path and its rights")
        failure = DiskError(f"{shown(path)} cannot be read ({error.strerror or error}). {advice}.")
        failure.errno = error.errno
        raise failure from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. Raises DiskError where it cannot be read."""
    with reading(path), path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_sha256(value: object) -> bool:
    """Return whether a value is a SHA-256 as `sha256_of` writes it."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _number_in(text: str) -> int | None:
    """Return the system's number in an error of safetensors."""
    found = re.search(r"\(os error (\d{1,4})\)", text)
    return int(found[1]) if found else None


def _of_disk(error: Exception) -> bool:
    """Return whether an error is the disk's: the system's, safetensors' for a full disk, or that of torch's writer."""
    if isinstance(error, OSError):
        return True
    name, text = type(error).__name__, str(error)
    torches = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)
    return torches or (name == "SafetensorError" and "I/O" in text) or "No space left" in text


def _free(path: Path) -> str:
    room = _room(path)
    return "" if room == math.inf else f"; {amount_of(room)} free"


def _room(path: Path) -> float:
    """Return the free bytes of a path's disk."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return math.inf


def amount_of(size: float) -> str:
    """Return a number of bytes for a message."""
    return f"{size / 2**20:,.0f} MiB" if size >= 10 << 20 else f"{size / 2**10:,.0f} KiB"


def shown(path: str | Path) -> str:
    """Return a path for a message, a very long one cut in its middle."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:120]}…{text[-60:]}"


def printable(text: str) -> str:
    """A text without what moves a terminal: control characters (but lines and tabs) are shown as \\x1b."""
    controls = (c for c in set(text) if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in _TURNS))
    for c in controls:
        text = text.replace(c, f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of the direction of writing


def read_json(path: Path, *, foreign: bool = False) -> Any:
    """Read a JSON file. Raises AddendaError for one that is missing, too long, too deep, or not strict JSON.

    foreign: of another program, which may have taken the last of a key that stands twice.
    """
    try:
        with open(path, "rb") as f:
            data = f.read(MOST + 1)
    except OSError as error:
        failure = DiskError(f"{shown(path)} cannot be read ({error.strerror or error}).")
        failure.errno = error.errno
        raise failure from None
    return json_of(data, path, foreign=foreign)


def json_of(data: bytes, path: Path, *, foreign: bool = False) -> Any:
    """Return the value of a JSON file's bytes, of which `MOST` + 1 were read. Raises AddendaError as `read_json`."""
    try:
        if len(data) > MOST:
            raise ValueError(f"more than {MOST >> 20} MiB")
        return parse_json(data.decode("utf-8"), foreign=foreign)
    except RecursionError:
        raise AddendaError(f"{shown(path)} is not JSON that can be read: it is nested too deeply.") from None
    except ValueError as error:
        raise AddendaError(f"{shown(path)} is not JSON ({error}).") from None


def parse_json(text: str, *, foreign: bool = False, room: int = 0) -> Any:
    """Return the value of strict JSON: each key of an object once, whole characters, no NaN, no thousands of digits.

    foreign: see `read_json`. room: bytes of the whole file, where the text is a part of it: a larger one may hold more.
    Raises ValueError, also for more values than such a file has, and RecursionError where it is nested too deeply.
    """
    check_values(text, room)
    each = None if foreign else _once
    value = json.loads(text, parse_constant=_float, parse_float=_float, parse_int=_integer, object_pairs_hook=each)
    if "\\ud" in text or "\\uD" in text:  # half a character, which can be neither printed nor saved
        json.dumps(value, ensure_ascii=False).encode()
    return value


def check_values(text: str | bytes | bytearray, room: int = 0) -> None:
    """Raise ValueError for JSON of so many values that they would fill the memory: two bytes can be a list of 64."""
    content: Any = text
    objects, lists, further = (content.count(m if isinstance(text, str) else m.encode()) for m in "{[,")
    if 3 * objects + lists + further > _VALUES + room // 64:
        raise ValueError(f"{objects + lists + further:,} values in it are more than such a file has")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for a key that stands twice: readers differ in which they take."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return made


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no number of JSON, or too large")
    return number


def strict(value: Any) -> Any:
    """Return a value as strict JSON has it: null for numbers that are not finite, text for types JSON does not have."""
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _integer(text: str) -> int | float:
    if len(text) > 300:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)
