"""Locks on files, for one process at a time; the system drops a lock when its holder ends, however that ends."""

import contextlib
import errno
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import shown, writing
from addenda.core.disk.place import folder_for, is_first
from addenda.core.disk.unfinished import clear

NAME = ".addenda-lock"  # of the file in a folder that one run at a time may write to
WAIT = 0.1  # seconds: whoever held a lock may be removing its file
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}  # what such disks answer


class Lock:
    """A lock on a file: `if not lock.take(): …`, later `lock.release()`. A disk without locks lets everybody in."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path, timeout=WAIT, thread_local=False)

    def take(self) -> bool:
        """Take the lock; False where another holds it. Its file and folder are made where they are missing."""
        while not self._lock.is_locked:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(poll_interval=0.01)
            except Timeout:
                return False
            except FileNotFoundError:  # whoever held it has just removed the folder
                continue
            except NotImplementedError:
                return True
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return True
                raise
        return True

    def release(self) -> None:
        self._lock.release()


@contextlib.contextmanager
def alone(folder: Path, *, here: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, which is made where it is missing, for the length of a `with` block.

    What killed runs have left half-written in it is removed first (`unfinished.clear`).
    Afterwards the lock's file is gone, and so is a folder that was made for it and that nothing was written to. here:
    whether this process locks; of several that make one run together only the first does.
    Raises AddendaError where another run is at the folder, and where it cannot be written to.
    """
    if not here:
        yield
        return
    new_folders = [p for p in (folder, *folder.parents) if not _there(p)]
    lock = Lock(folder / NAME)
    with writing(folder):
        locked = lock.take()
    if not locked:
        raise AddendaError(
            f"Another run is under way in {shown(folder)}. Wait for it to end, or choose another folder (--out)."
        )
    try:
        clear(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            if lock.path.stat().st_size == 0:
                lock.path.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for parent in new_folders:  # an empty one only
                parent.rmdir()


P = ParamSpec("P")
R = TypeVar("R")


def one_at_a_time(run: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that writes to the folder `out`, a keyword, to be alone in it for as long as it runs.

    Before anything else the folder must be one that may be written to, see `place.folder_for`. None: none is.
    """
    default = inspect.signature(run).parameters["out"].default

    @functools.wraps(run)
    def held(*args: P.args, **options: P.kwargs) -> R:
        out: Any = options.get("out", default)
        if out is None:
            return run(*args, **options)
        with alone(folder_for(out), here=is_first()):
            return run(*args, **options)

    return held


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return True  # whatever it is, it is not ours to remove
