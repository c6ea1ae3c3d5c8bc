"""The folder that an unfinished run leaves beside its target: what is done, so that the same command goes on.

OUT.unfinished/
  .lock         held while a run is under way
  plan.json     an identity of what its pieces depend on, and notes of the run
  …             pieces, of whatever kind the run makes
  model/        the finished folder, until its one rename to OUT (or another name, as the run has it)
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Self

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import check_above, read_json, reading, writing
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.lock import Lock
from addenda.core.disk.unfinished import clear
from addenda.core.file.identity import differences

_LOCK = ".lock"
PLAN = "plan.json"


class Unfinished:
    """The files of one run, for that run alone from `open` to `close`. Each is written whole or not at all.

    identity: what the pieces depend on. A run in which nothing of it differs takes them over.
    """

    finished: ClassVar[str] = "model"  # the name of the finished folder until it gets its own

    def __init__(self, out: Path, identity: dict):
        self.out, self.folder = out, beside(out)
        self.identity = json.loads(json.dumps(identity, default=str))
        self.resumed = False
        self._lock = Lock(self.folder / _LOCK)

    def open(self) -> Self:
        """Lock the folder for this run, and begin it or go on.

        Raises AddendaError where the target is taken, another run is at it, or the folder is not of such a run.
        """
        self.check_free()
        with writing(self.folder):
            free = self._lock.take()
        if not free:
            raise AddendaError(
                f"Another run is under way in {self.folder}. Wait for it to end, or choose another --out."
            )
        try:
            self._begin()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Unlock the folder for other runs, and delete it where nothing is in it."""
        with contextlib.suppress(OSError):
            if (self.folder / _LOCK).stat().st_size == 0:
                (self.folder / _LOCK).unlink()
        self._lock.release()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_) -> None:
        self.close()

    def _begin(self) -> None:
        check_free(self.out)  # a run that was under way may have ended between that look and the lock
        clear(self.folder)
        notes = self.notes()
        if notes is not None:
            identity = notes.get("identity")
            if not isinstance(identity, dict):
                raise AddendaError(f"{self.folder / PLAN} is not of such a run. Choose another --out.")
            keys = [k for k in self.identity if identity.get(k) != self.identity[k]]
            if keys:
                lines = differences({k: identity.get(k) for k in keys}, {k: self.identity[k] for k in keys})
                raise AddendaError(
                    f"{self.folder} holds the work of a run with other settings ({', '.join(keys)} differ): "
                    f"{'; '.join(map(str, lines))}. Give the same ones to go on, choose another --out, or remove that "
                    "folder."
                )
            self.resumed = True
            return
        names = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")] if self.folder.is_dir() else []
        if names:
            raise AddendaError(
                f"{self.folder} is where the work of this run would go, and it holds something else "
                f"({', '.join(sorted(names)[:4])}). Choose another --out, or move that folder."
            )
        self.note(identity=self.identity)

    def check_free(self) -> None:
        """Raise AddendaError where something is at the target.

        What a run has left that was killed between giving it its name and deleting the rest is deleted then.
        """
        try:
            check_free(self.out)
        except AddendaError:
            with contextlib.suppress(AddendaError, OSError):
                named = (self.notes() or {}).get("finished") is True and not (self.folder / self.finished).exists()
                empty = self.folder.is_dir() and {p.name for p in self.folder.iterdir()} <= {_LOCK}
                if (named or empty) and self._lock.take():
                    try:
                        self._clear()
                    finally:
                        self._lock.release()
            raise

    def notes(self) -> dict | None:
        """Read plan.json; None where there is none."""
        if not (self.folder / PLAN).is_file():
            return None
        try:
            content = read_json(self.folder / PLAN)
        except AddendaError as error:
            raise AddendaError(f"{error} Remove the folder {self.folder}.") from None
        if not isinstance(content, dict):
            raise AddendaError(f"{self.folder / PLAN} is not of such a run. Choose another --out.")
        return content

    def note(self, **what) -> None:
        with writing(self.folder):
            text = json.dumps((self.notes() or {}) | what, indent=1, default=str)
            write_atomically(self.folder / PLAN, text.encode())

    def pieces(self) -> Iterable[Path]:
        """Return the files that this run writes beside its plan, which go with it."""
        return ()

    def finish(self) -> None:
        """Give the finished folder its name and drop the rest."""
        self.note(finished=True)
        with writing(self.out):
            rename(self.folder / self.finished, self.out)
        self._clear()

    def drop(self) -> None:
        """Delete what this run has written: of one that has failed before it made anything worth keeping."""
        self._clear()

    def _clear(self) -> None:
        """Delete what this class writes; a file of anybody else's keeps the folder."""
        for path in [*self.pieces(), self.folder / PLAN, self.folder / _LOCK]:
            path.unlink(missing_ok=True)
        clear(self.folder)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def beside(out: Path) -> Path:
    """Return the work folder of a target."""
    return out.parent / f"{out.name}.unfinished"


def rename(folder: Path, out: Path) -> None:
    """Rename a finished folder to its place, which is free or an empty folder."""
    if out.is_dir():
        out.rmdir()
    folder.rename(out)


def check_free(out: Path) -> None:
    """Raise AddendaError where something is at a target already."""
    with reading(out):
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
        check_above(out, "--out")
    if taken:
        raise AddendaError(f"{out} is there already and is not empty. Choose another --out, or remove it.")


def check_apart(source: Path, out: Path) -> None:
    """Raise AddendaError where a target or its work folder is the source, lies in it or holds it."""
    source, out = source.resolve(), out.resolve()
    for name, folder in ((f"--out {out}", out), (f"{beside(out)}, the work folder of --out {out},", beside(out))):
        if folder == source or source in folder.parents or folder in source.parents:
            how = "is" if folder == source else "lies in" if source in folder.parents else "holds"
            raise AddendaError(f"{name} {how} the source, {source}. The source is never written to; name another.")


def identity_of(folder: Path) -> str:
    """Return a hash of a model folder's names, sizes, times of writing and configuration, to know it again."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        stat = path.stat()
        digest.update(f"{path.name}\x1f{stat.st_size}\x1f{stat.st_mtime_ns}\x1e".encode())
    digest.update((folder / "config.json").read_bytes())
    return digest.hexdigest()
