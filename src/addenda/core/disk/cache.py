"""The folder for files that can be made again and are kept between runs."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Return $ADDENDA_CACHE, else `addenda` in the platform's folder for caches. Not created here."""
    if folder := os.environ.get("ADDENDA_CACHE"):
        return Path(folder).expanduser()
    return user_cache_path("addenda", appauthor=False, opinion=False)
