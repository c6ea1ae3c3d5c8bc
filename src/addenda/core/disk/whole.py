"""A folder or file that gets its name only when it is whole: made beside it, flushed to disk, renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import check_above, path_of, reading, shown, writing


def free_place(out: str | Path, what: str = "out") -> Path:
    """Return a path at which nothing is yet. Raises AddendaError where something is, be it an empty folder."""
    path = path_of(out, what)
    with reading(path):
        taken = path.is_symlink() or path.exists()
        there = path.resolve()
        check_above(path, what)
    if taken:
        raise AddendaError(f"{shown(there)} is there already, and nothing is written over. Choose another {what}.")
    return path


@contextmanager
def whole(out: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a place beside `out`, an empty folder or no file yet, which gets its name when the block ends well.

    Where the block ends with an error of any kind, Ctrl-C too, nothing is left: no part, and no folder above it that
    was not there. Raises AddendaError where the disk or the path does not take it, or where the name was taken since.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]  # the innermost first
    beside: Path | None = None
    try:
        with writing(out):
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{out.name[:80]}.", dir=out.absolute().parent))
        place = beside if folder else beside / out.name
        yield place
        with writing(out):
            _flush(beside)
            if out.is_symlink() or out.exists():
                raise AddendaError(f"{shown(out)} has come to be while it was made; nothing is written over.")
            if folder:
                os.chmod(beside, 0o755)
            os.rename(place, out)
            _flush_folder(out.absolute().parent)
    except BaseException:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # one that another process has put something into stays
                parent.rmdir()
        raise
    if not folder:
        shutil.rmtree(beside, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # names must reach the disk too
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
