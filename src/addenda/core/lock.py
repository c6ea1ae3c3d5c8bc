"""One process at a time: a lock on a file, which the system drops when its holder ends, however that ends."""

import contextlib
import os
from pathlib import Path
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None
fcntl: Any = _fcntl


class Lock:
    """`if not lock.take(): …` and later `lock.release()`. Systems and disks without such locks let everybody in."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def take(self) -> bool:
        """False where another holds it. Its file and folder are made where they are missing."""
        while fcntl is not None and self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # whoever held it has just removed the folder
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return False
            except OSError:
                os.close(handle)
                return True
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    self._handle = handle
                    continue
            os.close(handle)  # of a file that was removed before it was locked: another may hold a new one
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
