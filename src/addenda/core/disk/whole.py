"""A folder or file that gets its name only when it is whole: made beside it, flushed to disk, renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import check_above, path_of, reading, shown, writing
from addenda.core.disk.atomic import flush_folder
from addenda.core.disk.unfinished import remove_dead, unfinished


def free_place(out: str | Path, what: str = "out") -> Path:
    """Return a path at which nothing is yet. What a killed writer to it has left hidden beside it is removed.

    Raises AddendaError where something is there, be it an empty folder.
    """
    path = path_of(out, what)
    with reading(path):
        taken = path.is_symlink() or path.exists()
        there = path.resolve()
        check_above(path, what)
        remove_dead(path)
    if taken:
        raise AddendaError(f"{shown(there)} is there already, and nothing is written over. Choose another {what}.")
    return path


@contextmanager
def whole(out: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a place beside `out`, an empty folder or no file yet, which gets its name when the block ends well.

    Where the block ends with an error of any kind, Ctrl-C too, nothing is left: no part, and no folder above it that
    was not there. Raises AddendaError where the disk or the path does not take it, or where the name was taken since.
    """
    parent = out.absolute().parent
    made = [p for p in (parent, *parent.parents) if not p.exists()]  # the innermost first
    place: Path | None = None
    try:
        with ExitStack() as held:
            with writing(out):
                parent.mkdir(parents=True, exist_ok=True)
                beside = held.enter_context(unfinished(out, folder=True))
            place = beside if folder else beside / out.name
            yield place
            with writing(out):
                flush(beside)
                if folder:
                    os.chmod(beside, 0o755)
                _name(place, out)
                flush_folder(parent)
    except BaseException as error:
        for folder_above in made:
            with suppress(OSError):  # one that another process has put something into stays
                folder_above.rmdir()
        if isinstance(error, AddendaError) and place is not None:  # the hidden place is no place of the user's
            error.args = (str(error).replace(str(place), str(out)),)
        raise


def _name(place: Path, out: Path) -> None:
    """Rename a finished file or folder. Raises AddendaError where its name was taken meanwhile."""
    taken = out.is_symlink() or out.exists()
    try:
        if not taken and place.is_file():
            try:
                os.link(place, out)  # unlike a rename it never takes the place of another file
            except FileExistsError:
                raise
            except OSError:  # a disk without links
                os.rename(place, out)
        elif not taken:
            os.rename(place, out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        taken = True
    if taken:
        raise AddendaError(f"{shown(out)} has come to be while it was made; nothing is written over.")


def flush(folder: Path) -> None:
    """Have the files in a folder, and in those in it, reach the disk, and the folder's own names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    flush_folder(folder)
