"""The folder for files that can be made again and are kept between runs, and how much of them is kept."""

import os
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Return $ADDENDA_CACHE, else `addenda` in the platform's folder for caches. Not created here."""
    if folder := os.environ.get("ADDENDA_CACHE"):
        return Path(folder).expanduser()
    return user_cache_path("addenda", appauthor=False, opinion=False)


def trim(folder: Path, room: int) -> None:
    """Remove the files in a folder, and in those in it, that were unused the longest, until the rest has room bytes."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.rglob("*.safetensors"):
        with suppress(OSError):
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found, key=lambda f: f[0]):
        if total <= room:
            break
        with suppress(OSError):
            path.unlink()
            total -= size
