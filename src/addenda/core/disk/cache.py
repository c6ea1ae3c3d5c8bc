"""Where what can be made again is kept between runs."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """$ADDENDA_CACHE, else `addenda` in the platform's folder for caches. Not created here."""
    if own := os.environ.get("ADDENDA_CACHE"):
        return Path(own).expanduser()
    return user_cache_path("addenda", appauthor=False, opinion=False)
