"""The hidden place of what is being written, and what killed runs have left there.

What gets a name NAME when it is whole lies beside that name until then, as

    .NAME.addenda-MACHINE-NUMBER

and its writer holds a lock on it, which the system drops when the process ends, however that ends. So one whose lock
can be taken is of nobody who lives. The next writer to that place removes it, and so does the next run in that folder.
Never removed are those whose writer lives, those of another machine (whose locks need not be seen here) or another
user, links, and whatever has no such name. On a disk without locks, and on systems without `flock`, the name has no
mark: it is of `tempfile`, and what a kill leaves there is the user's to remove.
"""

import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MARK = "addenda"
_BYTES = 160  # of a name that are kept: with the mark it is no longer than disks allow
_MOST = 1000  # writers to one place
_AT_ONCE = 8  # of them that are expected at one time


@contextmanager
def unfinished(path: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a new empty file or folder beside a path, in a `with` block, which may be renamed to it.

    What still has the hidden name at the end is removed, whole or not. What killed writers to the same path have left
    is removed first.
    """
    place, handle = _new(path, folder)
    try:
        yield place
    finally:
        if handle is None:
            _remove(place)
        else:
            if _is_at(handle, place):  # another may have that name again
                _remove(place)
            os.close(handle)


def remove_dead(path: Path) -> None:
    """Remove what killed writers to a path have left beside it."""
    for number in range(_MOST):
        place = _place(path, number)
        if os.path.lexists(place):
            _remove_dead(place)
        elif number >= _AT_ONCE:  # the first of several writers may have ended well, and the second been killed
            return


def clear(folder: Path) -> None:
    """Remove what killed writers have left in a folder, whatever they were writing; not in the folders in it."""
    ours = re.compile(rf"\..*\.{_MARK}-{_machine()}-\d+")
    with suppress(OSError):
        for name in os.listdir(folder):
            if ours.fullmatch(name):
                _remove_dead(folder / name)


def discard(path: Path) -> None:
    """Remove a folder: at whatever moment this is killed, it is there whole, or hidden as what killed writers leave.

    A half of it would be no more what it is known by. Where it cannot be removed, it stays.
    """
    for number in range(_MOST):
        place = _place(path, number)
        _remove_dead(place)
        if not os.path.lexists(place):
            break
    with suppress(OSError):
        os.rename(path, place)
        _remove(place)


def _new(path: Path, folder: bool) -> tuple[Path, int | None]:
    """Make a file or folder beside a path and lock it; return it and what holds the lock, None where there is none."""
    for number in range(_MOST if fcntl is not None else 0):
        place = _place(path, number)
        _remove_dead(place)
        try:
            if folder:
                os.mkdir(place, 0o700)
                handle = os.open(place, os.O_RDONLY)
            else:
                handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except (FileExistsError, FileNotFoundError):  # another writer's, who lives; or removed as soon as it was made
            if not path.absolute().parent.is_dir():
                raise
            continue
        locked = _lock(handle)
        if locked and _is_at(handle, place):
            return place, handle
        os.close(handle)
        if locked is None:
            _remove(place)
            break
    start = f".{_cut(path.name)}."
    if folder:
        return Path(tempfile.mkdtemp(prefix=start, dir=path.absolute().parent)), None
    handle, name = tempfile.mkstemp(prefix=start, dir=path.absolute().parent)
    os.close(handle)
    return Path(name), None


def _place(path: Path, number: int) -> Path:
    return path.absolute().with_name(f".{_cut(path.name)}.{_MARK}-{_machine()}-{number}")


def _cut(name: str) -> str:
    return os.fsencode(name)[:_BYTES].decode("utf-8", "ignore")


@cache
def _machine() -> str:
    """Return a short hash that tells this machine from others on one disk."""
    known = platform.node()
    with suppress(OSError):
        known += Path("/etc/machine-id").read_text()
    return hashlib.sha256(known.encode()).hexdigest()[:6]


def _remove_dead(place: Path) -> None:
    """Remove one hidden place, if it is this user's and no process holds it."""
    if fcntl is None or (handle := _opened(place)) is None:
        return
    try:
        found = os.fstat(handle)
        kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
        if kind and found.st_uid == os.geteuid() and _lock(handle) and _is_at(handle, place):
            _remove(place)
    finally:
        os.close(handle)


def _opened(place: Path) -> int | None:
    """Open what is at a place to lock it; None for nothing, a link, and what this user may not."""
    for how in (os.O_RDWR, os.O_RDONLY):  # some disks lock only what is open for writing, and no folder is
        try:
            return os.open(place, how | os.O_NOFOLLOW | os.O_NONBLOCK)
        except IsADirectoryError:
            continue
        except OSError:
            return None
    return None


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder; False where another holds it, None where the disk has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(handle: int, place: Path) -> bool:
    """Return whether an open file or folder still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(place))
    except OSError:
        return False


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()
