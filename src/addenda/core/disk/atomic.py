"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from addenda.core.disk.access import writing
from addenda.core.disk.unfinished import unfinished


def readable(value: object, at: str = "\n") -> str:
    """Format JSON for people and version control: an entry a line, but a list without objects in it on one line."""
    deeper = f"{at} "
    if isinstance(value, dict) and value:
        inner = [f"{_key(k)}: {readable(v, deeper)}" for k, v in value.items()]
        return f"{{{deeper}{f',{deeper}'.join(inner)}{at}}}"
    if isinstance(value, list) and _named(value):
        return f"[{deeper}{f',{deeper}'.join(readable(v, deeper) for v in value)}{at}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _key(key: object) -> str:
    """Format a key as JSON has it: always text, numbers too."""
    return json.dumps(key if isinstance(key, str) else json.dumps(key), ensure_ascii=False)


def _named(value: object) -> bool:
    """Return whether a list holds objects, however deep."""
    return isinstance(value, dict) or (isinstance(value, list) and any(_named(v) for v in value))


def write_atomically(path: Path, data: bytes | Sequence[bytes | memoryview]) -> None:
    """Write a file so that a reader sees the old one or the new one whole: beside it, flush to disk, rename.

    data: its bytes, or the pieces of them in order.
    Raises DiskError, which is an AddendaError, where the disk or the path does not take it; nothing is left behind.
    """
    pieces = [data] if isinstance(data, bytes) else data
    size = sum(map(len, pieces))
    with writing(path, size if size >= 1 << 20 else None):
        _write(path, pieces)


def _write(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    new_folders = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, pieces)
    except BaseException:
        with suppress(OSError):  # one that another process has put something into stays
            for folder in new_folders:
                folder.rmdir()
        raise


def _replace(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    with replacing(path) as beside, open(beside, "wb") as file:
        file.writelines(pieces)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file beside the path, to be written and closed, which then takes the path's name.

    For what is written by other libraries, to a path of their own. After an error nothing is left of it, and what was
    at the path stays.
    """
    with unfinished(path, folder=False) as beside:
        yield beside
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    flush_folder(path.absolute().parent)


def flush_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk too."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
