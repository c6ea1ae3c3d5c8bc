"""Where a command writes: a folder or file of the user's choice, in which nobody else's file is touched.

Other files may stand in such a folder: a log, a tracker's. What is refused, before anything is loaded, is a name that
would be written or deleted and that is taken by something which this library has not written there. Each command says
by which content its own files are known.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import file_of, path_of, read_json, reading, shown

Known = Callable[[Path], bool]  # whether what is at a path was written by this library


def is_first() -> bool:
    """Return whether this process writes: of several that make one run (as a launcher says by RANK) the first does."""
    return int(os.environ.get("RANK", "0")) == 0


def folder_for(out: str | Path, *, apart: Iterable[Any] = (), what: str = "out") -> Path:
    """Return a folder that may be written to, made or not. apart: what it must not be, such as the model and the data.

    Raises AddendaError for a path that names nothing, a file, a link, the home folder, the root of a disk, the folder
    of a model, and one of `apart`.
    """
    path = path_of(out, what)
    with reading(path):
        resolved, link, exists, folder = path.resolve(), path.is_symlink(), path.exists(), path.is_dir()
    if link:
        raise AddendaError(f"{shown(path)} is a symbolic link (to {shown(resolved)}). Name the folder itself: --out.")
    if exists and not folder:
        raise AddendaError(f"{shown(path)} is a file, and a folder is wanted. Choose another --out.")
    if resolved == Path(resolved.anchor) or resolved == _home():
        kind = "the root of a disk" if resolved.parent == resolved else "a home folder"
        raise AddendaError(f"{shown(path)} is {kind}. Choose a folder in it for --out.")
    for source in apart:
        if isinstance(source, (str, Path)) and str(source) and _resolved(source) == resolved:
            raise AddendaError(f"{shown(path)} is what is read (a model or data), and it is never written to. "
                               "Choose another --out.")  # fmt: skip
    if is_model(resolved):
        raise AddendaError(f"{shown(path)} is the folder of a model, which is never written to. Choose another --out.")
    return path


def is_model(folder: Path) -> bool:
    """Return whether a folder holds the configuration of a transformers model."""
    try:
        config = read_json(folder / "config.json", foreign=True)
    except AddendaError:
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def check_free(folder: Path, names: Mapping[str, Known]) -> None:
    """Raise AddendaError where one of the names that will be written is taken by something else."""
    with reading(folder):
        conflicts = [n for n, ours in names.items() if _exists(folder / n) and not _is(ours, folder / n)]
    if conflicts:
        raise AddendaError(
            f"{shown(folder)} holds {', '.join(conflicts)}, which would be written, and which addenda has not written "
            "there. Move it, or choose another --out."
        )


def file_for(out: str | Path, ours: Known, *, what: str = "path") -> Path:
    """Return a file that may be written. ours: whether an existing one may be replaced; an empty one may always.

    Raises AddendaError for a folder, a device, and a file of somebody else's.
    """
    path = file_of(out, what)
    with reading(path):
        taken = _exists(path) and not (path.is_file() and path.stat().st_size == 0) and not _is(ours, path)
    if taken:
        raise AddendaError(
            f"{shown(path)} is there already, and addenda has not written it. Move it, or name another file."
        )
    return path


def no_file(path: Path) -> bool:
    """Return whether a path is an empty folder, one to which only files with names of our own will be written."""
    return path.is_dir() and not any(path.iterdir())


def holds(path: Path, *signs: str) -> bool:
    """Return whether a text file begins (within 4 KiB) with all of these pieces of text, by which ours are known."""
    try:
        with path.open("rb") as f:
            head = f.read(4096).decode("utf-8", errors="replace")
    except OSError:
        return False
    return all(sign in head for sign in signs)


def _is(ours: Known, path: Path) -> bool:
    return not path.is_symlink() and ours(path)


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (OSError, RuntimeError):
        return None


def _resolved(path: str | Path) -> Path | None:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return None
